"""verl's ``custom_reward_function``: 1 for the right answer, 0 for another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from math_problems import is_correct


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    return float(is_correct(solution_str, ground_truth))
