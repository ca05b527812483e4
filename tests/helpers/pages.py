"""The pages of docs/ as tests read them: their blocks of code, and how many lines one changes in another."""

from __future__ import annotations

import difflib
import re

from paths import ROOT

DOCS = ROOT / "docs"


def code(page: str, language: str = "python") -> list[str]:
    """The blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def changed_lines(before: str, after: str) -> int:
    """Lines that were added to or changed in ``before``; imports are counted, blank lines and comments are not."""
    lines = [[re.sub(r"\s*#.*", "", line) for line in text.splitlines()] for text in (before, after)]
    diff = difflib.ndiff(*([line for line in each if line.strip()] for each in lines))
    return sum(line.startswith("+ ") for line in diff)
