"""What is shipped: two packages, one of which needs the other; and an import that brings torch and nothing more."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest
from paths import ROOT


def python(code, cwd, **environment):
    """In a process that finds the packages of this checkout, unless it is told to look elsewhere."""
    paths = {"PATH": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**paths, **environment})
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


def test_the_wheel_holds_two_packages_and_no_top_level_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"snr_optim", "snr_kernels"}
    assert {"snr_kernels/logprob_stats/_triton.py", "snr_kernels/py.typed", "snr_optim/py.typed"} <= set(names)
    assert len(names) == len(set(names))


def test_both_packages_import_from_the_built_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import snr_kernels, snr_optim; print(snr_kernels.__file__, snr_optim.__file__)"
    files = python(code, cwd=tmp_path, PYTHONPATH=str(tmp_path)).split()
    assert all(file.startswith(str(tmp_path)) for file in files)


def test_the_ops_need_nothing_of_snr_optim():
    code = "import sys, snr_kernels; print('snr_optim' in sys.modules, 'triton' in sys.modules)"
    assert python(code, cwd=ROOT / "kernels") == "False False"


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
