"""The library in the trainers of others: a folder for each trainer, which users import by name.

- ``transformers``: ``SNRCallback``, the learning rate in any transformers Trainer.
- ``trl``: ``OBLRTrainerMixin``, the baseline in TRL's GRPO and RLOO trainers.
- ``verl``: estimators and optimizers that verl's config names.
- ``slime``: the baseline, by two paths on slime's command line.

What several of them need stands beside the folders: ``_ceiling`` scales the steps under a trainer's own schedule,
``_checkpoint`` keeps a baseline beside a trainer's checkpoint, ``_unbiased`` reads settings that bias the gradient.
Nothing is imported here, and nothing else in the library imports from here.
"""
