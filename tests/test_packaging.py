"""What is shipped: kernels inside the package only, and an import that brings torch and nothing more."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def python(code, cwd, **environment):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={"PATH": "", **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [path] = out.glob("*.whl")
    return path


def test_the_wheel_has_no_top_level_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"snr_optim"}
    assert "snr_optim/kernels/logprob_stats.py" in names
    assert "snr_optim/py.typed" in names
    assert len(names) == len(set(names))


def test_kernels_import_from_the_built_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import snr_optim.kernels.logprob_stats as m, snr_optim; print(m.__file__, snr_optim.__file__)"
    files = python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path)).split()
    assert all(file.startswith(str(tmp_path)) for file in files)


def test_kernels_at_the_root_shadows_nothing():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import sys; sys.path.insert(0, '.'); import transformers, importlib.util;"
        "spec = importlib.util.find_spec('kernels'); print(spec.origin if spec else None)"
    )
    assert python(code, cwd=ROOT) == "None"  # a namespace at best: never a module of ours


def test_import_brings_torch_and_nothing_more():
    code = (
        "import sys, torch; before = set(sys.modules); import snr_optim;"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    imported = set(python(code, cwd=ROOT).split())
    assert not imported & {"triton", "transformers", "numpy", "trl", "verl", "rich", "matplotlib"}
    assert "snr_optim" in imported
