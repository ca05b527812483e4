"""Where the repository lies, and the environment of the processes that tests start in it."""

from __future__ import annotations

import os
from pathlib import Path

HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parent.parent
SOURCES = [ROOT, ROOT / "kernels", HELPERS]  # as pythonpath of pytest, in pyproject.toml


def environment(**variables: str) -> dict[str, str]:
    """That of this process, where Python finds the repository and the helpers first."""
    path = os.pathsep.join([*map(str, SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path} | variables
