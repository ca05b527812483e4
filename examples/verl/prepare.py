"""From a JSONL file of problems (GSM8K, MATH, and what looks like them) to the parquet file that verl reads."""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset

from examples.common.math_problems import INSTRUCTION, load_problems


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problems", type=Path, help="JSONL: question or problem, answer or solution")
    parser.add_argument("out", type=Path, help="parquet")
    parser.add_argument("--skip-bad-lines", action="store_true", help="leave out lines that cannot be read")
    args = parser.parse_args(argv)
    try:
        problems, bad = load_problems(args.problems, skip_bad=args.skip_bad_lines)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    rows = [
        {
            "data_source": args.problems.stem,
            "prompt": [{"role": "user", "content": f"{problem.prompt}\n{INSTRUCTION}"}],
            "reward_model": {"style": "rule", "ground_truth": problem.answer},
            "extra_info": {"index": index},
        }
        for index, problem in enumerate(problems)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(str(args.out))
    print(f"{args.out}: {len(rows)} problems" + (f", {len(bad)} bad lines left out" if bad else ""))


if __name__ == "__main__":
    main()
