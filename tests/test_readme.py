"""The README's code runs."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_readme_example_runs(capsys):
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    exec(code, {})
    assert "'observations': 1.0" in capsys.readouterr().out
