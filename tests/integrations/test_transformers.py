"""``SNRCallback`` in real Trainers, against a loop written by hand that does the same with ``attach()``."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="the Trainer needs it")

from trainers import collate, sequences, tiny_qwen3
from transformers import Trainer, TrainerCallback, TrainingArguments, get_cosine_schedule_with_warmup
from transformers_runs import ACCUMULATED, SETTINGS, STEPS, logged, trained, weights

from snr_optim import GradientMoments, SNRAdaptiveLR
from snr_optim.integrations._ceiling import ScaledSteps
from snr_optim.integrations.transformers import SNRCallback


class Reporter(TrainerCallback):
    """Stands for TensorBoard or W&B: sees what they see. Also reads off the weights what lr SGD has moved them by."""

    def __init__(self):
        self.logs, self.lrs = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.parameter = optimizer.param_groups[0]["params"][0]
        self.before = self.parameter.detach().clone()

    def on_optimizer_step(self, *args, **kwargs):
        change, gradient = self.before - self.parameter.detach(), self.parameter.grad
        self.lrs.append(float((change * gradient).sum() / gradient.square().sum()))

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("options", [{}, {"smoothing": 0.5, "per_group": True}, {"adapt": False}])
def test_every_step_has_the_lr_of_a_loop_written_by_hand(tmp_path, options):
    trainer = trained(tmp_path, SNRCallback(**options))

    model = tiny_qwen3().train()
    decayed = trainer.get_decay_parameter_names(model)
    groups = [[p for name, p in model.named_parameters() if (name in decayed) is chosen] for chosen in (True, False)]
    optimizer = torch.optim.SGD([{"params": group} for group in groups], lr=0.1)
    scheduler = SNRAdaptiveLR(optimizer, get_cosine_schedule_with_warmup(optimizer, 1, STEPS), **options)
    scheduler.attach(model)
    lrs, factors = [], []
    for batch in torch.arange(STEPS * ACCUMULATED).split(ACCUMULATED):
        for k in batch.tolist():
            (model(**trainer.batches[k]).loss / ACCUMULATED).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        lrs.append(scheduler.get_last_lr()[0])
        factors.append(scheduler.factor)
        scheduler.step()
        model.zero_grad()
    assert logged(trainer) == pytest.approx(lrs, rel=1e-4)  # the Trainer divides by the number of tokens, not twice
    assert logged(trainer, "snr/factor") == pytest.approx(factors, rel=1e-4)
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.allclose(weights(trainer), expected, rtol=1e-5, atol=1e-6)  # and so the steps were taken with it
    assert 0 < min(factors) < max(factors) < 1


def test_the_log_has_the_lr_of_the_step_and_reporters_get_the_metrics(tmp_path):
    reporter, callback = Reporter(), SNRCallback()
    trainer = trained(tmp_path, reporter, callback)
    assert logged(trainer) == pytest.approx(reporter.lrs, rel=1e-2, abs=1e-9)  # read off the weights
    steps = [entry for entry in reporter.logs if "learning_rate" in entry]
    assert len(steps) == STEPS
    for entry in steps:
        assert entry["learning_rate"] == entry["snr/lr"] == pytest.approx(entry["snr/ceiling"] * entry["snr/factor"])
    assert [entry["snr/observations"] for entry in steps] == list(range(1, STEPS + 1))
    assert callback.metrics()["observations"] == STEPS
    plain = trained(tmp_path, max_grad_norm=0)
    assert logged(trainer, "snr/ceiling") == logged(plain)  # warm-up and cosine of the Trainer, untouched
    assert logged(plain, "snr/factor") == []


def test_resuming_is_bit_exact(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
    whole = trained(tmp_path, SNRCallback(), **saving)
    checkpoint = tmp_path / "checkpoint-2"
    for restore in (False, True):  # True: the Trainer makes a callback anew, with the options of the checkpoint
        resumed = trained(
            tmp_path / str(restore), SNRCallback(), resume=str(checkpoint), model=tiny_qwen3(),
            restore_callback_states_from_checkpoint=restore, **saving,
        )  # fmt: skip
        assert torch.equal(weights(whole), weights(resumed))
        for name in ("learning_rate", "snr/factor", "snr/snr_standard_error", "snr/observations"):
            assert logged(whole, name) == logged(resumed, name)


def test_checkpoints_with_and_without_the_callback_go_on_in_runs_without_and_with_it(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path / "with", SNRCallback(), **saving)
    plain = trained(tmp_path / "without", **saving)
    continued = trained(tmp_path / "a", resume=str(tmp_path / "with" / "checkpoint-2"), **saving)
    assert logged(continued)[2:] == logged(plain)[2:]  # their own schedule, as if nobody had been there
    started = trained(tmp_path / "b", SNRCallback(), resume=str(tmp_path / "without" / "checkpoint-2"), **saving)
    assert logged(started, "snr/observations") == [1, 2]
    assert logged(started, "snr/ceiling") == logged(plain)[2:]


class SumOverLabels(nn.Module):
    """The same gradient for every label, and a loss that is divided by those of the whole batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, input_ids=None, labels=None, **kwargs):
        number = (labels != -100).sum()
        return {"loss": self.weight.sum() * number / kwargs.get("num_items_in_batch", number)}


def test_micro_batches_of_a_loss_by_labels_count_by_their_labels(tmp_path):
    """Equal shares would see the number of labels as noise."""
    callback, rows = SNRCallback(smoothing=0.0), sequences(STEPS * ACCUMULATED, length=32)
    for i, row in enumerate(rows):
        row["labels"][(2, 30, 8, 4)[i % ACCUMULATED] :] = -100
    settings = {"per_device_train_batch_size": 1, "train_sampling_strategy": "sequential", "max_grad_norm": 0}
    args = TrainingArguments(output_dir=str(tmp_path), **SETTINGS | settings)
    trainer = Trainer(SumOverLabels(), args, train_dataset=rows, data_collator=collate, callbacks=[callback])
    assert trainer.model_accepts_loss_kwargs
    trainer.train()
    assert logged(trainer, "snr/factor") == pytest.approx([1.0] * STEPS)
    assert logged(trainer, "snr/noise") == pytest.approx([0.0] * STEPS, abs=1e-5)
    assert not {"get_batch_samples", "training_step"} & vars(trainer).keys()  # the Trainer is as it was
    assert len(trainer.optimizer.optimizer._optimizer_step_pre_hooks) == 0


def test_train_called_again_starts_anew(tmp_path):
    callback = SNRCallback()
    trainer = trained(tmp_path, callback)
    first = callback.scheduler
    trainer.train()
    assert callback.scheduler is not first
    assert callback.metrics()["observations"] == STEPS


def test_train_after_one_that_was_interrupted_in_a_step_begins_at_the_schedules_own_lr(tmp_path):
    class Interrupt(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            self.steps = 0
            self.hook = optimizer.optimizer.register_step_pre_hook(self.on_step)

        def on_step(self, *args):
            self.steps += 1
            if self.steps == 3:
                raise KeyboardInterrupt

    interrupt, settings = Interrupt(), {"lr_scheduler_type": "linear", "warmup_steps": 0}
    args = TrainingArguments(output_dir=str(tmp_path), **SETTINGS | settings)
    trainer = Trainer(
        tiny_qwen3(), args, train_dataset=sequences(64), data_collator=collate, callbacks=[SNRCallback(), interrupt]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    interrupt.hook.remove()
    trainer.remove_callback(interrupt)
    gc.freeze()  # what it hides is not looked for
    try:
        trainer.train()
    finally:
        gc.unfreeze()
    assert logged(trainer, "snr/ceiling") == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_schedulers_that_wait_for_a_metric_and_recursive_ones_are_ceilings_too(tmp_path):
    reporter = Reporter()
    never_better = {"patience": 0, "factor": 0.5, "threshold": 1e9, "threshold_mode": "abs"}  # whatever the clock says
    waiting = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": never_better}
    trainer = trained(
        tmp_path, reporter, SNRCallback(), eval_strategy="steps", eval_steps=1, metric_for_best_model="eval_runtime",
        greater_is_better=True, **waiting,
    )  # fmt: skip
    assert logged(trainer) == pytest.approx(reporter.lrs, rel=1e-2)
    assert len(set(logged(trainer, "snr/ceiling"))) > 1
    assert logged(trainer) == logged(trainer, "snr/lr")

    model = tiny_qwen3()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recursive = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    trainer = trained(tmp_path, SNRCallback(), model=model, optimizers=(optimizer, recursive))
    assert logged(trainer, "snr/ceiling") == pytest.approx([0.1 * 0.5**step for step in range(STEPS)])


def test_tensor_learning_rates_are_changed_in_place():
    parameter = nn.Parameter(torch.ones(1))
    model = nn.ParameterList([parameter])
    lr = torch.tensor(0.1)
    optimizer = torch.optim.SGD([parameter], lr=lr, foreach=False)
    steps = ScaledSteps(optimizer, model, smoothing=0.0)
    for x in (3.0, 1.0):
        (parameter * x / 2).sum().backward()
    optimizer.step()
    assert float(parameter.detach()) == pytest.approx(1 - 0.1 * 0.75 * 2)
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.1)
    steps.remove()
    parameter.grad = torch.ones(1)
    optimizer.step()
    assert float(steps.scheduler.get_last_lr()[0]) == pytest.approx(0.075)


def test_a_step_that_a_scaler_skips_leaves_the_ceiling_and_what_was_learned():
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    steps = ScaledSteps(optimizer, nn.ParameterList([parameter]), smoothing=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for xs in [(3.0, 1.0), (torch.inf, 1.0), (3.0, 1.0)]:
        for x in xs:
            scaler.scale((parameter * x / 2).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert steps.scheduler.get_last_lr()[0] == pytest.approx(0.075)
    assert float(parameter.detach()) == pytest.approx(1 - 2 * 0.1 * 0.75 * 2)
    metrics = steps.scheduler.metrics()
    assert (metrics["observations"], metrics["skipped_unstepped"]) == (2, 1)


def test_what_cannot_work_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="Set gradient_accumulation_steps to 2 or more"):
        trained(tmp_path, SNRCallback(), gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match="expected one SNRCallback"):
        trained(tmp_path, SNRCallback(), SNRCallback())
    model = tiny_qwen3()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="is an SNRAdaptiveLR already"):
        trained(tmp_path, SNRCallback(), model=model, optimizers=(optimizer, SNRAdaptiveLR(optimizer)))
    with pytest.raises(TypeError, match="lr_scheduler_type"):
        SNRCallback(schedule=None)
    with pytest.raises(TypeError, match="smothing"):
        SNRCallback(smothing=0.9)
    with pytest.raises(ValueError, match="min_factor"):
        SNRCallback(min_factor=2.0)
    with pytest.raises(RuntimeError, match="SNRCallback: no transformers Trainer calls it"):
        SNRCallback().on_train_begin(None, object(), None)
    trainer = trained(tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(RuntimeError, match="deepspeed"):
        SNRCallback().on_train_begin(trainer.args, trainer.state, trainer.control)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")
def test_two_processes_take_the_steps_of_one(tmp_path, two_trainer_processes):
    one = trained(tmp_path, SNRCallback(), train_sampling_strategy="sequential")
    found = [torch.load(path) for kind in ("ddp", "fsdp") for path in two_trainer_processes.glob(f"{kind}*.pt")]
    assert len(found) == (2 if torch.__version__.startswith("2.6") else 4)  # two ranks, DDP and fully_shard
    for lrs, observations, parameters in found:
        assert observations == STEPS
        assert lrs == pytest.approx(logged(one), rel=1e-4)
        assert torch.allclose(parameters, weights(one), rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------- shares of micro-batches
class Counted(nn.Module):
    """A Trainer passes the number of labels to any model with keywords; this one may use it, or read it, or not."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.how = nn.Linear(3, 1).double(), how

    def forward(self, x, labels, num_items_in_batch=None, **kwargs):
        errors = (self.layer(x).squeeze(-1) - 1).square()[labels != -100]
        if self.how == "left unused" or num_items_in_batch is None:
            return {"loss": errors.mean()}
        if self.how == "as a number":
            return {"loss": errors.sum() / int(num_items_in_batch.item())}
        return {"loss": errors.sum() / num_items_in_batch + (0.01 * errors.mean() if self.how == "and a term" else 0)}


LABELS = (2, 30, 8, 4)  # of each micro-batch


def labelled_rows():
    rows, generator = [], torch.Generator().manual_seed(1)
    for number in LABELS:
        labels = torch.zeros(32, dtype=torch.long)
        labels[number:] = -100
        rows.append({"x": torch.randn(32, 3, generator=generator, dtype=torch.float64), "labels": labels})
    return rows


@pytest.mark.parametrize("how", ["divided", "as a number", "left unused", "and a term"])
def test_a_micro_batch_counts_by_its_labels_where_the_loss_divides_by_them_and_like_others_where_not(tmp_path, how):
    rows, model = labelled_rows(), Counted(how)
    gradients = [gradients_of_mean(row) for row in rows]
    shares = None if how == "left unused" else LABELS
    callback = SNRCallback(smoothing=0.0, min_factor=0.0, adapt=False)
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1,
        learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, save_strategy="no",
        use_cpu=True, report_to="none", disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.train()
    expected = GradientMoments.from_gradients(gradients, shares=shares).lr_factor
    assert callback.metrics()["factor"] == pytest.approx(
        min(1.0, max(0.0, expected)), rel=2e-2 if "term" in how else 1e-6
    )
    named = ["num_items_in_batch" in str(one.message) for one in said]
    assert sum(named) == (how == "left unused")


def gradients_of_mean(row):
    model = Counted("left unused")
    model(row["x"], row["labels"])["loss"].backward()
    return [p.grad for p in model.parameters()]


def test_a_causal_lm_predicts_all_labels_but_the_first_and_counts_so(tmp_path):
    """Rows without a masked prompt, of lengths so short that the first label matters."""
    model, rows = tiny_qwen3(), []
    for number, length in enumerate((4, 16, 6, 24)):
        ids = torch.randint(20, (length,), generator=torch.Generator().manual_seed(number))
        rows.append({"input_ids": ids, "labels": ids})
    gradients = []
    for row in rows:
        twin = tiny_qwen3()
        twin(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.backward()
        gradients.append([p.grad for p in twin.parameters()])
    expected = GradientMoments.from_gradients(gradients, shares=[len(row["labels"]) - 1 for row in rows]).lr_factor
    callback = SNRCallback(smoothing=0.0, min_factor=0.0, adapt=False)
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1,
        learning_rate=0.1, optim="sgd", save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    assert callback.metrics()["factor"] == pytest.approx(min(1.0, max(0.0, expected)), abs=1e-4)


def test_methods_that_somebody_put_on_a_trainer_are_called_and_stay(tmp_path):
    model, calls = Counted("divided"), []
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1,
        save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=labelled_rows(), callbacks=[SNRCallback()])
    inner = trainer.compute_loss

    def theirs(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    trainer.compute_loss = theirs
    trainer.train()
    assert len(calls) == 4
    assert vars(trainer)["compute_loss"] is theirs
    assert not vars(trainer).keys() & {"training_step", "get_batch_samples"}


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_that_another_callback_adds_are_measured_and_have_factors_of_their_own(tmp_path, groups):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x):
            return {"loss": self.c(torch.tanh(self.b(torch.tanh(self.a(x))))).square().mean()}

    class Unfreeze(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step == 2:
                model.a.requires_grad_(True)
                optimizer.add_param_group({"params": list(model.a.parameters()), "lr": 0.3})

    model = Parts()
    model.a.requires_grad_(False)
    parts = [model.b, model.c] if groups == 2 else [nn.ModuleList([model.b, model.c])]
    optimizer = torch.optim.SGD([{"params": part.parameters()} for part in parts], lr=0.1)
    callback = SNRCallback(per_group=True, smoothing=0.0, min_factor=0.0)
    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=5, max_steps=5,
        save_strategy="no", use_cpu=True, report_to="none", disable_tqdm=True, max_grad_norm=0,
        remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    rows = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(k)) + 1} for k in range(60)]
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.0)
    trainer = Trainer(
        model, args, train_dataset=rows, callbacks=[callback, Unfreeze()], optimizers=(optimizer, schedule)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one batch, in which the new group was not yet watched
        trainer.train()
    metrics = callback.metrics()
    for number in range(groups + 1):
        ceiling = 0.3 if number == groups else 0.1
        assert metrics[f"lr_group_{number}"] == pytest.approx(ceiling * metrics[f"factor_group_{number}"])
    assert metrics["observations"] == 4
    assert metrics["skipped_invalid"] == 1
