"""The README's code runs."""

from __future__ import annotations

import re

from paths import ROOT


def test_the_readme_examples_run(capsys):
    readme = (ROOT / "README.md").read_text()
    loop, baseline, norms, kernel, head = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    exec(loop, {})
    assert "'observations': 1.0" in capsys.readouterr().out
    exec(baseline, {})
    assert "'kappa': 64.0" in capsys.readouterr().out
    capsys.readouterr()
    exec(norms, {})
    assert "tensor(" in capsys.readouterr().out
    exec(kernel, {})
    exec(head, {})
    assert capsys.readouterr().out.count("tensor(") == 3
