"""verl's ``custom_reward_function``: 1 for the right answer, 0 for another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# verl loads this file by its path, in workers whose sys.path may lack the root of the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from examples.common.math_problems import is_correct


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return float(is_correct(solution_str, ground_truth))
