"""``make programs``: look for programs on which library and oracle disagree.

Each disagreement is printed as the seed that shows it and a program that could not be made simpler. With ``--resume``
a file keeps how far a run has come. ``--wrapper`` runs two processes, as ``tests/scheduler/test_programs.py`` does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from .check import outcome_of
from .processes import WRAPPERS, start


def outcomes(seeds: list[int], jobs: int) -> Iterator[tuple[int, Counter[str], str | None]]:
    if jobs == 1:
        yield from map(outcome_of, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(outcome_of, seeds, chunksize=16)


def with_progress(results: Iterable[tuple[int, Counter[str], str | None]], total: int) -> Iterator:
    try:
        from rich.progress import track
    except ImportError:
        yield from results
    else:
        yield from track(results, description="programs", total=total, disable=not sys.stderr.isatty())


def _in_processes(wrapper: str, first: int, number: int) -> int:
    """A disagreement ends the processes: they are started again behind it."""
    wrong, end = [], first + number
    while first < end:
        done = start(wrapper, first, end - first)
        print(done.stdout, flush=True)
        if done.returncode == 0:
            break
        found = re.search(r"^seed (\d+), process", done.stdout, re.MULTILINE)
        if found is None:
            print(done.stderr)
            return 1
        wrong.append(int(found[1]))
        first = wrong[-1] + 1
    print(f"{number} programs under {wrapper}, {len(wrong)} of which disagree: {wrong}")
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(prog="programs", description=__doc__)
    parser.add_argument("--programs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the others follow")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="a file that keeps the state of the run")
    parser.add_argument("--wrapper", choices=WRAPPERS, help="two processes, in place of one")
    options = parser.parse_args()
    if options.wrapper is not None:
        return _in_processes(options.wrapper, options.seed, options.programs)
    happened: Counter[str] = Counter()
    first, wrong = options.seed, []
    if options.resume is not None and options.resume.exists():
        state = json.loads(options.resume.read_text())
        first, wrong, happened = state["next"], state["wrong"], Counter(state["happened"])
    seeds = list(range(first, options.seed + options.programs))
    for seed, counts, disagreement in with_progress(outcomes(seeds, options.jobs), len(seeds)):
        happened += counts
        if disagreement is not None:
            wrong.append(seed)
            print(f"--seed {seed} --programs 1\n{disagreement}\n", flush=True)
        if options.resume is not None and (seed % 100 == 99 or seed == seeds[-1]):
            state = {"next": seed + 1, "wrong": wrong, "happened": happened}
            options.resume.write_text(json.dumps(state))
    for name, number in happened.most_common():
        print(f"{number:9d}  {name}")
    print(f"{options.programs} programs from seed {options.seed}, {len(wrong)} of which disagree: {wrong}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
