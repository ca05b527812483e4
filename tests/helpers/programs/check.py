"""Library and brute force, operation by operation: they must agree on everything that can be read off."""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Callable

from .language import Copy, Program, Schedule, Step, program_of, simpler
from .oracle import Oracle
from .subject import Subject, whole

REL = 1e-9  # what is asked for: float64 and some sums that cancel


class Disagreement(AssertionError):
    """What differs, and after which operation."""


def run(
    program: Program, subject: Subject | None = None, world: int = 1, also: Callable[[Subject], None] | None = None
) -> Counter[str]:
    """How often what happened; raises where library and brute force disagree, and where ``also`` does."""
    oracle = Oracle(program.setting, world)
    subject = subject or Subject(program.setting)
    for number, operation in enumerate(program.operations):
        expected, raised = oracle.do(operation), subject.do(operation)
        where = f"operation {number}, {operation}"
        if raised != expected:
            raise Disagreement(f"{where}: raised {raised}, expected {expected}")
        if isinstance(operation, (Step, Schedule, Copy)):
            _compare(where, oracle, subject)
            if also is not None:
                also(subject)
    return oracle.happened


def _compare(where: str, oracle: Oracle, subject: Subject) -> None:
    metrics = subject.scheduler.metrics()
    perhaps = oracle.perhaps_unstepped + oracle.may_be_cleared
    for name, unsure in (
        ("observations", 0), ("skipped_flat", 0), ("skipped_single", oracle.unsure), ("skipped_invalid", oracle.unsure),
        ("floor_bound", oracle.floor_ties), ("skipped_unstepped", perhaps),
    ):  # fmt: skip
        least = oracle.counts[name] - (unsure if name.startswith("skipped_") and name != "skipped_unstepped" else 0)
        if not least <= metrics[name] <= oracle.counts[name] + unsure:
            raise Disagreement(f"{where}: {name} is {metrics[name]}, expected {oracle.counts[name]}")
    unmeasured = metrics["skipped_single"] + metrics["skipped_invalid"]
    _equal(where, "single + invalid", unmeasured, oracle.counts["skipped_single"] + oracle.counts["skipped_invalid"])
    _equal(where, "factor", subject.scheduler.factor, oracle.factor_of(oracle.whole))
    _equal(where, "metrics()['factor']", metrics["factor"], oracle.factor_of(oracle.whole))
    written = len(oracle.groups) - oracle.just_added
    _equal(where, "lrs in the optimizer", subject.lrs[:written], oracle.lrs[:written])
    if oracle.in_charge:
        last = [float(lr) for lr in subject.scheduler.get_last_lr()]
        _equal(where, "get_last_lr()", last[:written], oracle.lrs[:written])
    _equal(where, "lrs of the last step", subject.used_lrs, oracle.used_lrs)
    if oracle.in_charge:
        _equal(where, "ceiling", metrics["ceiling"], oracle.ceilings[0])
        _equal(where, "lr", metrics["lr"], oracle.lrs[0])
    if oracle.setting.per_group:
        for number, averages in enumerate(oracle.of_groups[:written]):
            _equal(where, f"factor_group_{number}", metrics[f"factor_group_{number}"], oracle.factor_of(averages))
            if oracle.in_charge:
                _equal(where, f"lr_group_{number}", metrics[f"lr_group_{number}"], oracle.lrs[number])
    _compare_statistics(where, oracle, metrics)
    weights = subject.parameters
    for name, expected in oracle.params.items():
        _equal(where, name, whole(weights[name]).detach().flatten().tolist(), expected.detach().flatten().tolist())


def _compare_statistics(where: str, oracle: Oracle, metrics: dict[str, float]) -> None:
    averages = oracle.whole
    if not averages.seen:
        for name in ("signal", "noise", "snr", "snr_standard_error", "degrees_of_freedom"):
            _equal(where, name, metrics[name], math.nan)
        return
    signal, sq_norm, num = averages.mean("signal"), averages.mean("sq_norm"), averages.seen[-1].num
    noise = sq_norm - signal
    size = abs(signal) + abs(noise)
    _equal(where, "signal", metrics["signal"], signal, size)
    _equal(where, "noise", metrics["noise"], noise, size)
    freedom = averages.effective_number() * sum(
        a * (one.num - 1) for a, one in zip(averages.weights(), averages.seen, strict=True)
    )
    _equal(where, "degrees_of_freedom", metrics["degrees_of_freedom"], freedom)
    if noise > 1e-6 * size:
        _equal(where, "snr", metrics["snr"], signal / noise, size / noise * (size / noise))
        error = averages.standard_error() * (sq_norm / noise) ** 2
        _equal(where, "snr_standard_error", metrics["snr_standard_error"], error, 1e3 * (size / noise) ** 2)
    if abs(signal) > 1e-6 * size:
        critical = noise / signal * num if signal > 0 else math.inf
        _equal(where, "critical_batch_size", metrics["critical_batch_size"], critical, num * (size / signal) ** 2)


def _equal(
    where: str,
    name: str,
    got: float | list[float],
    expected: float | list[float],
    size: float = 1.0,
    tolerance: float = REL,
) -> None:
    pairs = [(got, expected)] if not isinstance(got, list) else list(zip(got, expected, strict=False))  # type: ignore
    same_length = not isinstance(got, list) or len(got) == len(expected)  # type: ignore[arg-type]
    if not same_length or not all(_close(a, b, size, tolerance) for a, b in pairs):
        raise Disagreement(f"{where}: {name} is {got}, expected {expected}")


def _close(a: float, b: float, size: float, tolerance: float) -> bool:
    if not (math.isfinite(a) and math.isfinite(b)):
        return a == b or (math.isnan(a) and math.isnan(b))
    return abs(a - b) <= tolerance * max(size, abs(b))


def shortest(program: Program, message: str) -> tuple[Program, str]:
    """The same disagreement, or another, by a program that cannot be made simpler."""
    improved = True
    while improved:
        improved = False
        for candidate in simpler(program):
            try:
                run(candidate)
            except Disagreement as error:
                program, message, improved = candidate, str(error), True
                break
    return program, message


def outcome_of(seed: int) -> tuple[int, Counter[str], str | None]:
    """What the program of a seed did, and how it disagrees."""
    program = program_of(seed)
    try:
        return seed, run(program), None
    except Disagreement as error:
        short, message = shortest(program, str(error))
        return seed, Counter(), f"{message}\n{short}"
    except Exception:
        return seed, Counter(), f"{traceback.format_exc()}\n{program}"
