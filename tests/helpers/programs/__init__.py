"""Random training programs: what a user may do to a model, an optimizer and a scheduler, and what must come of it.

``language`` says what a program is and draws one from a seed, ``parts`` holds the models, optimizers and schedules that
both sides share, ``subject`` runs a program with the library, ``oracle`` does so by brute force, and ``check`` compares
the two after every step. ``python -m tests.programs --programs 20000`` looks for disagreements.
"""
