"""The pages on loops and logs: their code runs, changes as many lines as they say, and names what is logged."""

from __future__ import annotations

import re
import time

import pytest
import torch
import torch.distributed as dist
from pages import DOCS, changed_lines, code
from torch import nn

from snr_optim import GradWeightedBaseline, SNRAdaptiveLR


def stated(page):
    """How many lines each changed loop of a page is said to change."""
    return [int(number) for number in re.findall(r"^Changed, (\d+) lines:$", (DOCS / page).read_text(), re.MULTILINE)]


def pairs(page):
    blocks = code(page)
    return list(zip(blocks[::2], blocks[1::2], strict=True))


@pytest.mark.parametrize("page", ["accelerate.md", "transformers.md"])
def test_as_many_lines_are_changed_as_the_page_says(page):
    assert [changed_lines(before, after) for before, after in pairs(page)] == stated(page)


def names(tmp_path):
    """What the loops of the page on accelerate take for granted: two steps of four micro-batches."""
    torch.manual_seed(0)
    batches = list(torch.randn(8, 3, 4) + 1)
    return {
        "model": nn.Linear(4, 2), "loader": torch.utils.data.DataLoader(torch.cat(batches), batch_size=3),
        "steps": [batches[:4], batches[4:]], "loss_of": lambda model, batch: model(batch).square().mean(),
        "folder": str(tmp_path),
    }  # fmt: skip


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run_both(before, after, tmp_path):
    """The loop as it was, and changed; the weights of both, and the changed one's scheduler."""
    found = []
    for block in (before, after):
        scope = names(tmp_path)
        exec(block, scope)
        found.append(scope)
    old, new = ([p.detach().clone() for p in scope["model"].parameters()] for scope in found)
    return found[1], not all(map(torch.equal, old, new))


@pytest.mark.parametrize("number", [0, 1])
def test_the_loops_of_accelerate_run_and_measure(tmp_path, number):
    pytest.importorskip("accelerate")
    scope, differs = run_both(*pairs("accelerate.md")[number], tmp_path)
    scheduler = scope["snr"] if number else scope["scheduler"]
    assert scheduler.metrics()["observations"] == 2
    assert 0 < scheduler.factor < 1
    assert differs
    if number:
        resumed = names(tmp_path)
        exec(pairs("accelerate.md")[1][1].split("for batch")[0], resumed)
        resumed["accelerator"].load_state(str(tmp_path))
        assert resumed["snr"].metrics() == scheduler.metrics()


@pytest.mark.parametrize("number", [2, 3])
def test_the_loops_of_ddp_and_fsdp2_run_and_measure(tmp_path, number, one_process_group):
    if number == 3 and torch.__version__.startswith("2.6"):
        pytest.skip("fully_shard of torch 2.6 does not run on a CPU")
    scope, _ = run_both(*pairs("accelerate.md")[number], tmp_path)
    assert scope["scheduler"].metrics()["observations"] == 2
    assert 0 < scope["scheduler"].factor < 1


def test_the_trainer_of_the_page_on_transformers_runs_and_logs(tmp_path):
    pytest.importorskip("accelerate")
    from trainers import sequences, tiny_qwen3

    logs = []
    for block in pairs("transformers.md")[0]:
        scope = {"model": tiny_qwen3(), "dataset": sequences(24), "folder": str(tmp_path)}
        exec(block, scope)
        logs.append([entry for entry in scope["trainer"].state.log_history if "learning_rate" in entry])
    plain, ours = logs
    assert len(ours) == 3
    assert [entry["snr/ceiling"] for entry in ours] == [entry["learning_rate"] for entry in plain]
    assert ours[-1]["learning_rate"] == ours[-1]["snr/lr"] < plain[-1]["learning_rate"]
    documented = {f"snr/{name}" for name in tables()[0]}
    assert {name for name in ours[-1] if name.startswith("snr/")} <= documented


# -- metrics.md --------------------------------------------------------------------------------------------------------


def tables():
    """The names in the two tables of the page: of the scheduler, of the baseline."""
    sections = (DOCS / "metrics.md").read_text().split("\n## ")[1:3]
    return [re.findall(r"^\| `(\w+)`", section, re.MULTILINE) for section in sections]


def measured(**options):
    model = nn.Linear(4, 2)
    scheduler = SNRAdaptiveLR(torch.optim.AdamW(model.parameters(), lr=0.1), **options)
    with scheduler.attach(model):
        for _ in range(2):
            for _ in range(2):
                model(torch.randn(3, 4)).square().mean().backward()
            scheduler.optimizer.step()
            scheduler.optimizer.zero_grad()
    return scheduler


def learned():
    baseline = GradWeightedBaseline()
    baseline.update(torch.rand(8), torch.rand(8), groups=4)
    return baseline


def test_the_page_names_what_is_logged_and_nothing_else():
    of_scheduler, of_baseline = tables()
    assert sorted(of_scheduler) == sorted(measured(per_group=True).metrics())
    assert set(of_scheduler) - set(measured().metrics()) == {"factor_group_0", "lr_group_0"}
    assert sorted(of_baseline) == sorted(learned().metrics())


class Recorder:
    """Stands for a tracker: keeps what it is given, by name."""

    def __init__(self):
        self.values = {}

    def add_scalar(self, name, value, step):
        self.values[name] = value

    def log(self, metrics, step):
        self.values |= metrics

    log_metrics = log


def everything(scheduler, baseline):
    return {f"snr/{name}" for name in scheduler.metrics()} | {f"baseline/{name}" for name in baseline.metrics()}


def test_the_snippets_send_every_metric():
    scheduler, baseline = measured(), learned()
    blocks = code("metrics.md")
    assert len(blocks) == 3
    for name, block in zip(("writer", "run", "mlflow"), blocks, strict=True):
        recorder = Recorder()
        exec(block, {"scheduler": scheduler, "baseline": baseline, "step": 1, name: recorder})
        assert set(recorder.values) == everything(scheduler, baseline)
        assert recorder.values["snr/factor"] == scheduler.factor


def test_tensorboard_takes_them(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    scheduler, baseline = measured(), learned()
    with SummaryWriter(str(tmp_path)) as writer:
        exec(code("metrics.md")[0], {"scheduler": scheduler, "baseline": baseline, "step": 1, "writer": writer})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == everything(scheduler, baseline)
    assert events.Scalars("snr/factor")[0].value == pytest.approx(scheduler.factor)


def test_weights_and_biases_takes_them(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    scheduler, baseline = measured(), learned()
    with wandb.init(mode="offline", dir=str(tmp_path), project="test") as run:
        exec(code("metrics.md")[1], {"scheduler": scheduler, "baseline": baseline, "step": 1, "run": run})
        run.log({"the next": 1}, step=2)  # which ends the first step
        deadline = time.monotonic() + 30
        while "snr/factor" not in dict(run.summary) and time.monotonic() < deadline:
            time.sleep(0.05)  # another process writes it
        assert everything(scheduler, baseline) <= set(dict(run.summary))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trainer_sends_them_to_tensorboard_as_the_page_says(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    pytest.importorskip("accelerate")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from trainers import sequences, tiny_qwen3

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    block = pairs("transformers.md")[0][1].replace('report_to="none"', 'report_to="tensorboard"')
    scope = {"model": tiny_qwen3(), "dataset": sequences(24), "folder": str(tmp_path)}
    exec(block, scope)
    [folder] = {path.parent for path in (tmp_path / "events").rglob("events.*")}
    events = EventAccumulator(str(folder)).Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("train/snr/")}
    assert tags == {f"train/snr/{name}" for name in measured().metrics()}
    assert len(events.Scalars("train/snr/factor")) == 3
