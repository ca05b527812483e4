"""Random training programs against brute force; and that wrong formulas and forgotten rules would be found by them."""

from __future__ import annotations

import ast
import itertools
from collections import Counter

import programs.language
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from programs.check import Disagreement, run, shortest
from programs.language import Program, program_by, program_of
from programs.processes import WRAPPERS, start

import snr_optim.attachment
import snr_optim.noise.moments
import snr_optim.noise.tracking
import snr_optim.scheduler
from snr_optim import GradientMoments, SNRAdaptiveLR
from snr_optim.noise import AccumulationSource, euclidean
from snr_optim.noise.averages import MomentAverages
from snr_optim.noise.gradients import LocalGradients
from snr_optim.noise.tracking import BatchTracker

PROGRAMS = 300
# How often things must happen at least, so that the test cannot come to test nothing.
AT_LEAST = {
    "Backward": 3000, "Skipped": 50, "TwoLosses": 20, "Grad": 200, "Edit": 100, "Clip": 300, "Zero": 1000,
    "Step": 1000, "Schedule": 1000, "Copy": 100, "Freeze": 80, "AddGroup": 15, "Attach": 30,
    "again": 60, "fails": 40, "grad_first": 80, "closure": 80, "in pieces": 5, "flat": 200, "nan": 30, "inf": 8,
    "edit in place": 30, "edit replaced": 30, "edit data": 30, "edited": 5, "overflow": 5, "other parameters": 50,
    "copy saved": 20, "copy state_dict": 20, "copy deepcopy": 20, "copy pickle": 20, "copy in the middle": 10,
    "in a warm-up": 40, "behind a warm-up": 40,
    "group added": 10, "dropped": 100, "not empty": 80, "steps": 1000, "observations": 500, "skipped_single": 200,
    "skipped_flat": 20, "skipped_invalid": 150,
}  # fmt: skip
AT_LEAST_OF_30 = {
    "Backward": 250, "Skipped": 3, "Clip": 15, "Zero": 80, "steps": 80, "Schedule": 70, "Copy": 5, "Attach": 1,
    "closure": 5, "flat": 15, "nan": 1, "dropped": 5, "observations": 60, "skipped_single": 3, "skipped_flat": 1,
    "skipped_invalid": 5,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def disagreement(program: Program) -> str | None:
    try:
        run(program)
    except Disagreement as error:
        return str(error)
    return None


def test_programs_do_what_brute_force_says():
    happened: Counter[str] = Counter()
    wrong = []
    for seed in range(PROGRAMS):
        try:
            happened += run(program_of(seed))
        except Disagreement as error:
            wrong.append((seed, str(error)))
    if wrong:
        seed, message = wrong[0]
        program, message = shortest(program_of(seed), message)
        pytest.fail(f"{len(wrong)} of {PROGRAMS} programs disagree; that of seed {seed}: {message}\n{program}")
    rare = {name: happened[name] for name, least in AT_LEAST.items() if happened[name] < least}
    assert not rare, f"too rare to be tested: {rare}"
    assert happened["observations"] > 0.4 * happened["steps"]


@settings(max_examples=60, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(st.randoms(use_true_random=False))
def test_programs_that_hypothesis_draws_do_what_brute_force_says(draw):
    """Of odder shapes than those of seeds; ``--hypothesis-profile=explore`` looks for new ones."""
    program = program_by(draw)
    try:
        run(program)
    except Disagreement as error:
        program, message = shortest(program, str(error))  # hypothesis would take minutes for it
        pytest.fail(f"{message}\n{program}")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_programs_of_two_processes_do_what_brute_force_says_of_both(wrapper):
    if wrapper == "fully_shard" and torch.__version__.startswith("2.6"):
        pytest.skip("fully_shard of torch 2.6 does not run on a CPU")
    done = start(wrapper, 0, 30, timeout=180)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    happened = ast.literal_eval(done.stdout)
    rare = {name: least for name, least in AT_LEAST_OF_30.items() if happened.get(name, 0) < least}
    assert not rare, f"too rare to be tested: {rare}, {happened}"


# -- the harness can fail ---------------------------------------------------------------------------


def noise_over_m(monkeypatch):
    """V_hat divided by m, not by m - 1."""
    monkeypatch.setattr(snr_optim.noise.averages, "noise_of", lambda sq_norm, mean_sq, num: (mean_sq - sq_norm) / num)


def signal_clamped_before_the_average(monkeypatch):
    noise = snr_optim.noise.moments.noise_of
    monkeypatch.setattr(snr_optim.noise.averages, "noise_of", lambda *one: torch.minimum(noise(*one), one[0]))


def mean_of_ratios(monkeypatch):
    """Every batch normalised by its own norm, so that all count alike."""
    update = MomentAverages.update

    def normalised(self, moments):
        square = torch.as_tensor(moments.sq_norm_of_mean)
        if square > 0 and square.isfinite():
            moments = GradientMoments(square / square, moments.mean_of_sq_norms / square, moments.num_sub_batches)
        update(self, moments)

    monkeypatch.setattr(MomentAverages, "update", normalised)


def unequal_weights(monkeypatch):
    """The average of the squared norms forgets a little faster than that of the signal."""
    update = MomentAverages.update

    def faster(self, moments):
        before = self.sq_norm_sum
        update(self, moments)
        self.sq_norm_sum = self.sq_norm_sum - 0.01 * self.smoothing * before

    monkeypatch.setattr(MomentAverages, "update", faster)


def factor_that_lags_one_step(monkeypatch):
    fold_in = SNRAdaptiveLR._fold_in

    def late(self, whole, by_parameter_group, *, one_each):
        last = self.__dict__.get("_lagging")
        self._lagging = whole, by_parameter_group
        if last is not None and len(last[1]) == len(by_parameter_group):
            fold_in(self, *last, one_each=one_each)

    monkeypatch.setattr(SNRAdaptiveLR, "_fold_in", late)


def lr_that_lags_one_step(monkeypatch):
    """The statistics are right, and written by step() only: after the optimizer's."""
    fold_in, write = SNRAdaptiveLR._fold_in, SNRAdaptiveLR._write_lr

    def silent(self, whole, by_parameter_group, *, one_each):
        monkeypatch.setattr(SNRAdaptiveLR, "_write_lr", lambda self: None)
        fold_in(self, whole, by_parameter_group, one_each=one_each)
        monkeypatch.setattr(SNRAdaptiveLR, "_write_lr", write)

    monkeypatch.setattr(SNRAdaptiveLR, "_fold_in", silent)


def sizes_are_forgotten(monkeypatch):
    sub_batch = AccumulationSource.sub_batch
    monkeypatch.setattr(AccumulationSource, "sub_batch", lambda self, size: sub_batch(self, 1.0))


def loss_scale_is_forgotten(monkeypatch):
    monkeypatch.setattr(snr_optim.attachment, "loss_scale", lambda: None)


def autograd_grad_counts(monkeypatch):
    monkeypatch.setattr(snr_optim.noise.tracking, "accumulates_into", lambda parameter: True)


def cleared_gradients_are_not_noticed(monkeypatch):
    monkeypatch.setattr(LocalGradients, "changed_since", lambda self, states: False)


def leftovers_are_not_noticed(monkeypatch):
    finish = BatchTracker.finish

    def forgiving(self):
        batch = finish(self)
        batch.must_be_zero = []
        return batch

    monkeypatch.setattr(BatchTracker, "finish", forgiving)


def clipped_gradients_are_measured(monkeypatch):
    """As a hook before the step would find them."""
    finish = BatchTracker.finish

    def late(self):
        batch = finish(self)
        for i, p in enumerate(self.gradients.parameters):
            if i in batch.of_grad and p.grad is not None:
                batch.of_grad[i] = self.norm_of_grad(p)
        return batch

    monkeypatch.setattr(BatchTracker, "finish", late)


def schedule_is_ignored(monkeypatch):
    monkeypatch.setattr(SNRAdaptiveLR, "_ceilings", lambda self: self.base_lrs)


def factor_is_multiplied_again_by_every_step(monkeypatch):
    get_lr = SNRAdaptiveLR.get_lr

    def compounding(self):
        lrs = get_lr(self)
        return [lr * 0.99 for lr in lrs] if self._step_count > 2 else lrs

    monkeypatch.setattr(SNRAdaptiveLR, "get_lr", compounding)


def resumed_without_statistics(monkeypatch):
    monkeypatch.setattr(MomentAverages, "load_state_dict", lambda self, state: None)


def groups_share_one_factor(monkeypatch):
    monkeypatch.setattr(SNRAdaptiveLR, "_used_averages", lambda self: [self._averages])


def floor_is_forgotten(monkeypatch):
    monkeypatch.setattr(
        SNRAdaptiveLR, "min_factor", property(lambda self: 0.0, lambda self, value: None), raising=False
    )


def ceiling_is_forgotten(monkeypatch):
    monkeypatch.setattr(
        SNRAdaptiveLR, "max_factor", property(lambda self: 1.0, lambda self, value: None), raising=False
    )


def auto_does_not_shrink(monkeypatch):
    monkeypatch.setattr(SNRAdaptiveLR, "_ratio", lambda self, averages: averages.ratio())


def standard_error_of_infinitely_many_batches(monkeypatch):
    """Without n / (n - 1)."""
    error = MomentAverages.ratio_standard_error

    def larger(self):
        a2, a3 = self.weight_squared / self.weight**2, self.weight_cubed / self.weight**3
        return error(self) * ((a2 - 2 * a3 + a2**2) / a2).sqrt()

    monkeypatch.setattr(MomentAverages, "ratio_standard_error", larger)


def flat_batches_count_as_observations(monkeypatch):
    update = MomentAverages.update

    def counting(self, moments):
        update(self, moments)
        self.observations = self.observations + self.skipped_flat
        self.skipped_flat = torch.zeros_like(self.skipped_flat)

    monkeypatch.setattr(MomentAverages, "update", counting)


def failed_passes_are_kept(monkeypatch):
    """What arrived before a backward pass failed counts like any other gradient."""
    on_begin, finish = BatchTracker._on_begin, BatchTracker.finish

    def begin(self, *one):
        self._running.clear()
        return on_begin(self, *one)

    def running_forgotten(self):
        self._running.clear()
        return finish(self)

    monkeypatch.setattr(BatchTracker, "_on_begin", begin)
    monkeypatch.setattr(BatchTracker, "finish", running_forgotten)


def the_norm_of_adam_is_ignored(monkeypatch):
    monkeypatch.setattr(SNRAdaptiveLR, "_optimizer_norm", lambda self, model: euclidean)


def passes_of_checkpoints_count(monkeypatch):
    """A reentrant checkpoint runs backward passes of its own."""
    monkeypatch.setattr(snr_optim.noise.tracking, "is_nested_backward", lambda: False)


def frozen_parameters_are_not_noticed(monkeypatch):
    monkeypatch.setattr(snr_optim.attachment.Attachment, "_trainable", lambda self: [])


def a_copy_is_not_in_charge(monkeypatch):
    monkeypatch.setattr(SNRAdaptiveLR, "__getstate__", lambda self: {**self.__dict__, "_attachment": None})


def groups_share_one_tensor(monkeypatch):
    monkeypatch.setattr(snr_optim.scheduler, "separate_lrs", lambda optimizer: None)


def a_nan_is_forgotten(monkeypatch):
    """What is not finite counts as no gradient at all."""
    update = MomentAverages.update

    def forgiving(self, moments):
        if torch.as_tensor(moments.mean_of_sq_norms).isfinite():
            update(self, moments)

    monkeypatch.setattr(MomentAverages, "update", forgiving)


MUTATIONS = [
    noise_over_m, signal_clamped_before_the_average, mean_of_ratios, unequal_weights, factor_that_lags_one_step,
    lr_that_lags_one_step, sizes_are_forgotten, loss_scale_is_forgotten, autograd_grad_counts,
    cleared_gradients_are_not_noticed, leftovers_are_not_noticed, clipped_gradients_are_measured, schedule_is_ignored,
    factor_is_multiplied_again_by_every_step, resumed_without_statistics, groups_share_one_factor, floor_is_forgotten,
    ceiling_is_forgotten, auto_does_not_shrink, standard_error_of_infinitely_many_batches,
    flat_batches_count_as_observations, failed_passes_are_kept, the_norm_of_adam_is_ignored,
    passes_of_checkpoints_count, frozen_parameters_are_not_noticed, a_copy_is_not_in_charge, groups_share_one_tensor,
    a_nan_is_forgotten,
]  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_wrong_library_is_found(mutation):
    for seed in range(PROGRAMS):
        program = program_of(seed)
        with pytest.MonkeyPatch.context() as monkeypatch:
            mutation(monkeypatch)
            try:
                found = disagreement(program) is not None
            except Exception:  # a mutation that makes the library fail is found, too
                found = True
        if found and disagreement(program) is None:  # it is the mutation that was found
            return
    pytest.fail(f"{PROGRAMS} programs do not tell that {mutation.__name__.replace('_', ' ')}")


def test_a_program_is_its_own_text_and_its_seed():
    for seed in range(20):
        assert eval(str(program_of(seed)), vars(programs.language)) == program_of(seed)
    assert len({str(program_of(seed)) for seed in range(100)}) == 100


def test_a_disagreement_is_made_short(monkeypatch):
    noise_over_m(monkeypatch)
    found = ((program_of(seed), disagreement(program_of(seed))) for seed in itertools.count())
    program, message = next(one for one in found if one[1] is not None)
    short, message = shortest(program, message)
    assert len(short.operations) == 3 < len(program.operations)  # two backward passes and a step
    assert disagreement(short) == message
