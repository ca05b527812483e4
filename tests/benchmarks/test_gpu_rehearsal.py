"""`make gpu`, rehearsed: every command runs, at small sizes on a CPU; none stops another; nothing measured is lost."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from paths import ROOT

from benchmarks import gpu, harness, per_sample_norms
from benchmarks.gpu import Command

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PEERS = ("verl", "trl", "liger_kernel", "flash_attn", "cut_cross_entropy", "opacus", "backpack")
NAMES = [command.name for command in gpu.commands(CPU, True, Path(), Path())]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


# ------------------------------------------------------------------------------------------------------ every command
@pytest.fixture
def no_peers(monkeypatch):
    """As on a machine whose packages are given; what other tests have imported is hidden, too."""
    for name in [*PEERS, *sys.modules]:
        if name.split(".")[0] in PEERS:
            monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture
def cheap_collection():
    """Benchmarks collect garbage for the memory's sake; what other tests have left is none of theirs."""
    gc.freeze()
    yield
    gc.unfreeze()


def call(command, monkeypatch):
    """In this process, as imports of a process of its own take longer than all else."""
    monkeypatch.chdir(ROOT)
    for name, value in gpu.surroundings(CPU).items():
        monkeypatch.setenv(name, value)
    words = list(command.words)
    assert words.pop(0) == "-m"
    name = words.pop(0)
    if name == "pytest":
        assert pytest.main(words) == 0
        return
    monkeypatch.setattr(sys, "argv", [name, *words])
    with torch.compiler.set_stance("force_eager"):  # as compilers take their time
        importlib.import_module(name).main()


@pytest.mark.parametrize("name", NAMES)
def test_every_command_runs(name, tmp_path, monkeypatch, no_peers, cheap_collection):
    [command] = [each for each in gpu.commands(CPU, True, tmp_path, tmp_path) if each.name == name]
    assert all(map(gpu.installed, command.needs))
    if name == "fsdp" and torch.__version__.startswith("2.6"):
        pytest.skip("its fully_shard is not for CPUs")
    if name == "ddp":  # without torchrun, which fsdp is started by
        command = command._replace(words=command.words[command.words.index("examples.ddp_fsdp") - 1 :])
    call(command, monkeypatch)
    if not command.writes:
        return
    result = json.loads((tmp_path / "cpu" / f"{name}.json").read_text())
    assert result["rows"]
    assert result["environment"]["commit"] == harness.commit()
    assert {"device", "torch", "triton", "transformers"} <= result["environment"].keys()
    assert "--small" in result["command"]
    assert str(tmp_path) not in result["command"]
    assert gpu.read_result(command, tmp_path / "cpu" / f"{name}.json")["rows"] >= 2
    if name == "logprob_stats":
        assert {"verl", "trl"} <= result["left_out"].keys()


@no_gpu
@pytest.mark.parametrize("name", NAMES)
def test_the_options_for_a_gpu_are_known(name, tmp_path, monkeypatch, capsys):
    """Each says that there is none, after it has read the others."""
    monkeypatch.setattr(gpu, "results_folder", lambda device: "nvidia-h200")
    monkeypatch.setattr(gpu, "processes", lambda device: [])
    [command] = [each for each in gpu.commands(CUDA, False, tmp_path, tmp_path) if each.name == name]
    assert "triton" in command.needs
    assert command.budget < gpu.LIMIT
    if "pytest" in command.words:
        [path] = [word for word in command.words if word.endswith(".py")]
        assert (ROOT / path).is_file()
        return
    module = max(index for index, word in enumerate(command.words) if word.startswith(("benchmarks.", "examples.")))
    words = command.words[module - 1 :]
    with pytest.raises(SystemExit) as error:
        call(command._replace(words=words), monkeypatch)
    assert "no GPU here" in capsys.readouterr().err or "'cuda' is not available here" in str(error.value)
    if "--models" in words and name.startswith("per_sample"):
        assert set(words[words.index("--models") + 1 :]) <= {case[0] for case in per_sample_norms.CASES["cuda"]}


def test_the_runner_as_a_process(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    words = ["--device", "cpu", "--small", "--only", "baseline_speed", "--out", str(out), "--work", str(work)]
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "baseline_speed  passed" in done.stdout
    [row] = json.loads((out / "summary.json").read_text())["commands"]
    assert row["result"]["rows"] == json.loads((out / "cpu" / "baseline_speed.json").read_text())["rows"]
    assert row["rows"] >= 8
    assert "snr-optim shrink" in row["output"]


def test_tests_need_pytest_alone(tmp_path):
    """Neither random order, nor several processes, nor hypothesis where no property is stated."""
    code = "import sys; sys.modules['hypothesis'] = None; import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    words = ["-q", "-k", "outputs", "tests/kernels/test_head_grad_norms.py"]
    without = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=os.environ | without, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


# --------------------------------------------------------------------------------------------------- what can go wrong
WRITE = """
import json, os, sys, time
path = {path!r}
os.makedirs(os.path.dirname(path), exist_ok=True)
open(path + ".ran", "a").write("x")
rows = [{{"implementation": "snr-optim", "ms": 1.0}}, {{"implementation": "peer", "refused": "TypeError: no"}}]
open(path, "w").write(json.dumps({{"rows": rows}}))
print("rows are written", flush=True)
"""


class Rehearsal:
    """The runner with made-up commands; each leaves an ``x`` in ``NAME.json.ran`` whenever it runs."""

    def __init__(self, folder, monkeypatch, capsys):
        self.out, self.work, self.patch, self.capsys = folder / "out", folder / "work", monkeypatch, capsys
        self.commands = []
        monkeypatch.setattr(gpu, "commands", lambda *_: self.commands)
        monkeypatch.setattr(gpu, "GRACE", 0.3)

    def add(self, name, code="", *, needs=(), budget=0):
        code = WRITE.format(path=str(self.out / "cpu" / f"{name}.json")) + code
        self.commands.append(Command(name, ("-c", code), needs, budget, writes=True))

    def __call__(self, *words):
        argv = ["gpu", "--device", "cpu", "--out", self.out, "--work", self.work, *words]
        self.patch.setattr(sys, "argv", [str(word) for word in argv])
        try:
            gpu.main()
        except SystemExit as end:
            return end.code, self.capsys.readouterr().out
        return 0, self.capsys.readouterr().out

    def rows(self):
        return {row["command"]: row for row in json.loads((self.out / "summary.json").read_text())["commands"]}

    def ran(self, name):
        path = self.out / "cpu" / f"{name}.json.ran"
        return len(path.read_text()) if path.exists() else 0


@pytest.fixture
def rehearsal(tmp_path, monkeypatch, capsys):
    return Rehearsal(tmp_path, monkeypatch, capsys)


def test_what_fails_stops_nothing_and_what_passed_is_not_done_again(rehearsal):
    rehearsal.add("fails", "sys.exit('it is broken')")
    rehearsal.add("dies", "os.kill(os.getpid(), 9)")
    rehearsal.add("works")
    code, out = rehearsal()
    assert code == 1
    rows = rehearsal.rows()
    assert {name: row["status"] for name, row in rows.items()} == {
        "fails": "failed", "dies": "failed", "works": "passed"
    }  # fmt: skip
    assert (rows["fails"]["why"], rows["dies"]["why"]) == ("it is broken", "killed by SIGKILL")
    for name, row in rows.items():  # as far as it came, on disk and in the summary
        assert len(json.loads((rehearsal.out / "cpu" / f"{name}.json").read_text())["rows"]) == 2
        assert (row["rows"], row["refused"]) == (1, ["peer: TypeError: no"])
        assert "rows are written" in row["output"]
        assert row["seconds"] >= 0
    assert "dies: failed, killed by SIGKILL" in out
    assert "works: not measured: peer: TypeError: no" in out
    lines = [json.loads(line) for line in (rehearsal.work / "state.jsonl").read_text().splitlines()]
    assert [line["command"] for line in lines] == ["fails", "dies", "works"]

    rehearsal.commands[:1] = []
    rehearsal.add("fails")  # mended, and last
    code, out = rehearsal("--resume")
    assert code == 1
    assert {name: rehearsal.ran(name) for name in rows} == {"fails": 2, "dies": 2, "works": 1}
    assert "passed before" in out
    assert rehearsal.rows()["fails"]["status"] == "passed"


def test_another_commit_is_another_run(rehearsal, monkeypatch):
    rehearsal.add("works")
    assert rehearsal()[0] == rehearsal("--resume")[0] == 0
    assert rehearsal.ran("works") == 1
    monkeypatch.setattr(gpu, "code_digest", lambda: "changed, and not committed")
    rehearsal("--resume")
    assert rehearsal.ran("works") == 2
    monkeypatch.setenv("SNR_OPTIM_COMMIT", "another")
    rehearsal("--resume")
    assert rehearsal.ran("works") == 3
    assert json.loads((rehearsal.out / "summary.json").read_text())["environment"]["commit"] == "another"
    rehearsal("--resume", "--small")  # not the sizes that passed
    assert rehearsal.ran("works") == 4


def test_one_by_one_they_add_up_where_the_folder_is_emptied(rehearsal, tmp_path):
    for name in ("first", "second"):
        rehearsal.add(name)
    rehearsal("--only", "first")
    (rehearsal.out / "summary.json").rename(tmp_path / "elsewhere.json")
    (rehearsal.out / "cpu" / "first.json").unlink()
    rehearsal("--only", "second")
    assert list(rehearsal.rows()) == ["first", "second"]
    assert (rehearsal.out / "cpu" / "first.json").is_file()

    (rehearsal.work / "state.jsonl").unlink()  # another machine, that gets the summary only
    (rehearsal.out / "cpu" / "first.json").unlink()
    assert rehearsal("--resume", tmp_path / "elsewhere.json")[0] == 0
    assert (rehearsal.ran("first"), rehearsal.ran("second")) == (1, 2)
    assert json.loads((rehearsal.out / "cpu" / "first.json").read_text())["rows"]
    assert rehearsal("--only", "third")[0] == 2
    assert rehearsal("--resume", tmp_path / "nowhere.json")[0] == 2


def test_no_command_takes_longer_than_it_may_and_its_children_end_with_it(rehearsal, tmp_path):
    child = tmp_path / "child"
    spawn = (
        "import signal, subprocess\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"open({str(child)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))\ntime.sleep(60)"
    )
    rehearsal.add("hangs", spawn)
    rehearsal.add("says", "try:\n    time.sleep(60)\nfinally:\n    print('what failed so far')")
    rehearsal.add("works")
    start = time.monotonic()
    code, out = rehearsal("--limit", 2.5)
    assert time.monotonic() - start < 40
    rows = rehearsal.rows()
    assert code == 1
    assert [row["status"] for row in rows.values()] == ["timed out", "timed out", "passed"]
    assert rows["hangs"]["why"] == "no end after 2.5 s"
    assert rows["hangs"]["rows"] == 1
    assert "what failed so far" in rows["says"]["output"]
    assert "hangs: timed out" in out
    status = Path(f"/proc/{child.read_text()}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_what_would_not_be_done_in_time_is_not_started(rehearsal):
    rehearsal.add("long", budget=500)
    rehearsal.add("short", budget=1)
    code, _ = rehearsal("--within", 100)
    assert code == 1
    assert {name: row["status"] for name, row in rehearsal.rows().items()} == {
        "long": "not started", "short": "passed"
    }  # fmt: skip
    assert "500 s" in rehearsal.rows()["long"]["why"]
    assert "long" not in (rehearsal.work / "state.jsonl").read_text()


def test_who_is_ended_from_outside_says_what_was_done(rehearsal):
    rehearsal.add("works")
    rehearsal.add("ends", "os.kill(os.getppid(), 15)\ntime.sleep(60)")
    rehearsal.add("later")
    code, _ = rehearsal()
    rows = rehearsal.rows()
    assert code == 1
    assert [row["status"] for row in rows.values()] == ["passed", "stopped", "not started"]
    assert rows["ends"]["rows"] == 1


def test_what_is_missing_is_said_first_and_left_out(rehearsal, monkeypatch):
    there = gpu.installed
    monkeypatch.setattr(gpu, "installed", lambda module: module not in ("pytest", "hypothesis") and there(module))
    rehearsal.add("tests", needs=("pytest", "hypothesis", "torch"))
    rehearsal.add("works")
    code, out = rehearsal()
    assert code == 0  # nothing failed
    assert out.index("not installed: pytest (all tests)") < out.index("works ...")
    assert rehearsal.rows()["tests"]["why"] == "not installed: pytest, hypothesis"
    assert rehearsal.ran("tests") == 0
    assert {"pytest", "hypothesis"} <= json.loads((rehearsal.out / "summary.json").read_text())["missing"].keys()


def test_the_list_is_shown_and_nothing_runs(rehearsal):
    rehearsal.add("works", budget=77)
    code, out = rehearsal("--list")
    assert code == 0
    assert "works" in out
    assert "77 s" in out
    assert not rehearsal.out.exists()


def test_a_whole_run_leaves_eight_files_with_plain_names():
    found = gpu.commands(CPU, False, Path("out"), Path("work"))
    assert sum(command.writes for command in found) + 1 <= 8
    assert all(set(command.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_") for command in found)
    assert len({command.name for command in found}) == len(found)


# ------------------------------------------------------------------------------------- the harness, on a GPU and broken
def test_time_and_memory_on_a_gpu_are_asked_for_in_order(monkeypatch):
    """With a device that keeps a diary."""
    diary = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            diary.append("event")

        def elapsed_time(self, end):
            return 2.0

    there = SimpleNamespace(total_memory=143_771 << 20)
    for name, value in {
        "Event": Event, "synchronize": lambda: diary.append("wait"), "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 100, "max_memory_allocated": lambda: 164, "empty_cache": lambda: None,
        "get_device_name": lambda device: "NVIDIA H200", "get_device_capability": lambda device: (9, 0),
        "get_device_properties": lambda device: there,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    timing = harness.time_calls(lambda turn: diary.append(turn), CUDA, seconds=0.01)
    assert (timing.median, timing.calls) == (2.0, 5)
    assert timing.host < 2.0
    assert diary[-17:] == ["wait", *(each for turn in range(5) for each in ("event", turn, "event")), "wait"]
    assert harness.peak_memory(lambda: None, CUDA) == 64
    harness.release(CUDA)
    assert harness.results_folder(CUDA) == "nvidia-h200"
    run = harness._run
    monkeypatch.setattr(harness, "_run", lambda *words: "580.1\n580.1" if words[0] == "nvidia-smi" else run(*words))
    found = harness.environment(CUDA)
    assert (found["device"], found["driver"], found["capability"]) == ("NVIDIA H200", "580.1", "9.0")
    assert found["memory_gib"] == pytest.approx(140.4, abs=0.1)
    json.dumps(found)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert gpu.processes(CUDA) == (["-n", "4", "--dist", "worksteal"] if gpu.installed("xdist") else [])


def test_a_copy_without_git_is_known_by_its_code(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert harness.commit() == f"code {harness.code_digest()}"
    assert len(harness.code_digest()) == 12
    monkeypatch.setenv("SNR_OPTIM_COMMIT", "1234567")
    assert harness.commit() == "1234567"


def test_what_cannot_be_measured_is_a_row_and_only_ours_is_a_failure(capsys):
    def rows():
        yield {"ms": 1.0}
        raise error

    for error, who, broken in (
        (ValueError("no\nat all"), "peer", False),
        (torch.OutOfMemoryError("too much"), "snr-optim", False),
        (FloatingPointError("results that are not finite"), "snr-optim", True),
    ):
        found = harness.attempt({"implementation": who}, rows(), CPU)
        assert found[0] == {"implementation": who, "ms": 1.0}
        assert found[1]["refused"] == f"{type(error).__name__}: {error}".split("\n")[0]
        try:
            harness.conclude(found, ["ms", "refused"], lambda row: row["implementation"] == "snr-optim")
            ended = False
        except SystemExit as end:
            ended = "not finite" in str(end)
        assert ended == broken
    assert "too much" in capsys.readouterr().out


def test_numbers_that_json_has_not_cost_no_file(tmp_path):
    path = tmp_path / "results" / "some.json"
    harness.write_json(path, "some", {}, rows=[{"error": float("nan"), "ms": float("inf"), "num": 1}])
    assert json.loads(path.read_text())["rows"] == [{"error": "nan", "ms": "inf", "num": 1}]
    assert [each.name for each in path.parent.iterdir()] == ["some.json"]


# ------------------------------------------------------------------------------------------------------------ the page
def test_the_page_and_the_makefile_name_what_there_is():
    page = (ROOT / "docs" / "gpu.md").read_text()
    assert all(f"`{name}`" in page for name in NAMES)
    assert all(
        f"`{option}`" in page or f" {option} " in page for option in ("--only", "--resume", "--within", "--limit")
    )
    assert "$(PYTHON) -m benchmarks.gpu --device cuda --out $(OUT) $(ARGS)" in (ROOT / "Makefile").read_text()
