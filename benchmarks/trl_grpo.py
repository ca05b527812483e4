"""TRL's GRPO with and without the two lines: reward, spread of the gradient norm, and what a step costs.

    python -m benchmarks.trl_grpo                              # 20 minutes on two cores
    python -m benchmarks.trl_grpo --only time --shapes tiny    # a minute

Learning: ``examples.trl_grpo``'s arithmetic, where both methods start from the same weights and see the same
problems in the same order; several constant rates for GRPO, several ceilings for OBLR-PO, AdamW, 20 steps of warm-up.

Time: TRL alone, with ``SNRCallback``, and with that and ``OBLRTrainerMixin``, in turns of a few steps, in one process
and one thread, every output of the same length. ``paired`` compares the steps of a turn and has the noise of the
machine, less in CPU seconds; ``inside`` is CPU time measured within our own code and has little. The forward pass of
the weights is timed by itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from transformers import PrinterCallback, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.demo_task import LAST, prepare, run_missing
from benchmarks.harness import environment, print_table, progress, version, write_json
from examples.trl_grpo import arithmetic_task, make_trainer, parse_arguments
from snr_optim import AccumulationSource
from snr_optim.attachment import Attachment
from snr_optim.integrations._ceiling import ScaledSteps
from snr_optim.integrations.transformers import SNRCallback
from snr_optim.integrations.trl import OBLRTrainerMixin

LRS = {"grpo": [1e-4, 2e-4, 5e-4, 2e-3], "oblr-po": [5e-4, 1e-3, 2e-3, 4e-3]}

# ---------------------------------------------------------------------------------------------------------- learning


@dataclass(frozen=True)
class Setting:
    """One run."""

    method: str
    lr: float
    seed: int
    steps: int


def learn(job: tuple[Setting, Path]) -> dict[str, Any]:
    setting, weights = job
    warnings.filterwarnings("ignore", category=FutureWarning)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--method", setting.method, "--lr", setting.lr, "--seed", setting.seed, "--steps", setting.steps]
        args = parse_arguments([*map(str, words), "--out", folder])
        model, *task = arithmetic_task(args, warm=False)
        model.load_state_dict(torch.load(weights, weights_only=True))
        trainer = make_trainer(args, model, *task)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rows = [row for row in trainer.state.log_history if "reward" in row]
    rewards, norms = [row["reward"] for row in rows], [row["grad_norm"] for row in rows]
    return asdict(setting) | {
        "final": mean(rewards[-LAST:]),
        "mean": mean(rewards),
        "grad_norm_spread": stdev(norms) / mean(norms),
        "rewards": [round(reward, 6) for reward in rewards],
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By method and lr: mean over the seeds, and standard deviation of the final reward over them."""
    result = []
    for method, lr in sorted({(row["method"], row["lr"]) for row in rows}):
        runs = [row for row in rows if (row["method"], row["lr"]) == (method, lr)]
        finals = [row["final"] for row in runs]
        result.append(
            {
                "method": method,
                "lr": lr,
                "seeds": len(runs),
                "final": mean(finals),
                "final_std": stdev(finals) if len(finals) > 1 else None,
                "mean": mean(row["mean"] for row in runs),
                "grad_norm_spread": mean(row["grad_norm_spread"] for row in runs),
            }
        )
    return result


# -------------------------------------------------------------------------------------------------------------- time

SHAPES = {  # hidden, intermediate, layers, heads
    "tiny": (64, 128, 2, 4),
    "3M": (256, 768, 4, 4),
    "25M": (512, 1536, 8, 8),
}
PROMPTS, GROUP, MICRO_BATCHES, TOKENS = 8, 8, 4, 16
TURNS = {"tiny": (8, 5), "3M": (5, 3), "25M": (2, 2)}  # of each kind; measured steps in each, after one to warm up


class Timed(GRPOTrainer):
    """TRL's trainer, which knows how much CPU time it takes to generate and to make micro-batches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = {"their_batch": 0.0, "our_batch": 0.0, "their_inputs": 0.0, "our_inputs": 0.0, "weights": 0.0}
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        return self.timed("their_batch", super()._generate_and_score_completions, inputs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return self.timed("their_inputs", super()._prepare_inputs, inputs)

    def timed(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args)
        finally:
            self.seconds[name] += time.process_time() - start


class TimedOBLR(OBLRTrainerMixin, Timed):
    """The same with our advantages; the difference to what is inside of it is our own time."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        return self.timed("our_batch", super()._generate_and_score_completions, inputs)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return self.timed("our_inputs", super()._prepare_inputs, inputs)

    def gradient_weights(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.timed("weights", super().gradient_weights, batch)  # type: ignore[no-any-return]


OURS = (  # all that runs in a step by the callback
    (AccumulationSource, "_on_gradient"), (AccumulationSource, "_on_end"), (Attachment, "_on_step"),
    (ScaledSteps, "_on_begin"), (ScaledSteps, "_on_end"),
    (SNRCallback, "on_optimizer_step"), (SNRCallback, "on_step_end"), (SNRCallback, "on_log"),
)  # fmt: skip


@contextmanager
def callback_clock() -> Iterator[list[float]]:
    """CPU seconds of each call of what the callback has put into the step."""
    spent: list[float] = []
    originals = [(cls, name, getattr(cls, name)) for cls, name in OURS]

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(time.process_time() - start)

        return wrapper

    for cls, name, original in originals:
        setattr(cls, name, timed(original))
    try:
        yield spent
    finally:
        for cls, name, original in originals:
            setattr(cls, name, original)


class Steps(TrainerCallback):
    """Wall and CPU seconds from the beginning of a step to that of the next one, its log included."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> tuple[float, float]:
        """Medians over the steps but the first, which builds an optimizer's state."""
        pairs = list(zip(self.times[1:], self.times[2:], strict=False))
        return median(b[0] - a[0] for a, b in pairs), median(b[1] - a[1] for a, b in pairs)


KINDS: dict[str, tuple[type[Timed], Callable[[], list[Any]]]] = {
    "plain": (Timed, list),
    "callback": (Timed, lambda: [SNRCallback()]),
    "both": (TimedOBLR, lambda: [SNRCallback()]),
}


def turn(shape: str, kind: str, measured: int, folder: str) -> dict[str, float]:
    """A few steps of one kind: seconds per step."""
    hidden, intermediate, layers, heads = SHAPES[shape]
    tiny, tokenizer, data, reward = arithmetic_task(parse_arguments(["--out", folder]), warm=False)
    model = tiny
    if shape != "tiny":
        torch.manual_seed(0)
        model = Qwen3ForCausalLM._from_config(
            Qwen3Config(**tiny.config.to_dict() | {
                "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
                "num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": hidden // heads,
                "layer_types": None,
            }), attn_implementation="eager",
        )  # fmt: skip
    config = GRPOConfig(
        output_dir=folder, max_steps=measured + 1, per_device_train_batch_size=PROMPTS // MICRO_BATCHES * GROUP,
        gradient_accumulation_steps=MICRO_BATCHES, num_generations=GROUP, max_completion_length=TOKENS,
        generation_kwargs={"min_new_tokens": TOKENS}, learning_rate=1e-6, lr_scheduler_type="constant",
        loss_type="luspo", scale_rewards="none", beta=0.0, disable_dropout=True, max_grad_norm=0.0,
        bf16=False, use_cpu=True, gradient_checkpointing=False, logging_steps=1, report_to="none",
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer_class, callbacks = KINDS[kind]
    steps = Steps()
    trainer = trainer_class(
        model, reward, config, train_dataset=data, processing_class=tokenizer, callbacks=[*callbacks(), steps]
    )
    trainer.remove_callback(PrinterCallback)
    with callback_clock() as callback:
        trainer.train()
    done, spent = measured + 1, trainer.seconds
    ours = spent["our_batch"] - spent["their_batch"] - spent["weights"] + spent["our_inputs"] - spent["their_inputs"]
    wall, cpu = steps.seconds()
    return {
        "wall": wall,
        "cpu": cpu,
        "weights": spent["weights"] / done,
        "mixin": ours / done if kind == "both" else 0.0,
        "callback": sum(callback) / done,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def measure(shape: str, turns: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Medians over the turns; shares are of the plain step of the same turn."""
    warnings.filterwarnings("ignore")  # of the settings that keep all outputs as long, and of TRL's own
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:  # whatever is imported or built at the first call
            turn("tiny", kind, 1, folder)
        for number in range(turns):
            kinds = list(KINDS)[number % 3 :] + list(KINDS)[: number % 3]  # none is always the first
            of_kind = {kind: turn(shape, kind, TURNS[shape][1], folder) for kind in kinds}
            found.append(of_kind)
            report(f"{shape}: turn {number + 1}")

    def share(clock: str, kind: str, *without: str) -> float:
        return median(
            (each[kind][clock] - sum(each[kind][name] for name in without)) / each["plain"][clock] - 1 for each in found
        )

    def inside(name: str) -> float:
        return median(each["both"][name] / each["plain"]["cpu"] for each in found)

    return {
        "shape": shape,
        "parameters": found[0]["plain"]["parameters"],
        "tokens_per_step": PROMPTS * GROUP * TOKENS,
        **{f"{kind}_step_s": median(each[kind]["wall"] for each in found) for kind in KINDS},
        **{f"{kind}_step_cpu_s": median(each[kind]["cpu"] for each in found) for kind in KINDS},
        "callback_paired": share("wall", "callback"),
        "callback_paired_cpu": share("cpu", "callback"),
        "both_paired": share("wall", "both"),
        "both_paired_cpu": share("cpu", "both"),
        "besides_weights_paired_cpu": share("cpu", "both", "weights"),
        "weights_inside": inside("weights"),
        "callback_inside": inside("callback"),
        "mixin_inside": inside("mixin"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("learning", "time"), help="half of it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2, help="runs of the first half at the same time")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--turns", type=int, help="of each kind (default: 8 of tiny, 5 of 3M, 2 of 25M)")
    parser.add_argument("--out", type=Path, default=Path("runs/trl_grpo_bench"))
    parser.add_argument("--resume", action="store_true", help="measure only what --out lacks")
    args = parser.parse_args()
    origin = environment(torch.device("cpu")) | {name: version(name) for name in ("trl", "transformers", "accelerate")}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "trl_grpo.json"
    found = json.loads(path.read_text()) if args.resume and path.exists() else {}
    timed, rows = found.get("time", []), found.get("runs", [])

    def save() -> None:
        rows.sort(key=lambda row: (row["method"], row["lr"], row["seed"]))
        write_json(path, "trl_grpo", origin, time=timed, learning=summary(rows), runs=rows)

    if args.only != "learning":
        torch.set_num_threads(1)
        turns = {shape: args.turns or TURNS[shape][0] for shape in args.shapes}
        turns = {shape: num for shape, num in turns.items() if shape not in {row["shape"] for row in timed}}
        with progress(sum(turns.values())) as report:
            for shape, num in turns.items():
                timed.append(measure(shape, num, report))
                save()
        print_table(timed, list(timed[0]))
    if args.only != "time":
        starts = prepare(args.out, args.seeds)
        settings = [
            Setting(method, lr, seed, args.steps) for seed in args.seeds for method, lrs in LRS.items() for lr in lrs
        ]
        done = [Setting(*(row[field.name] for field in fields(Setting))) for row in rows]
        jobs = [(setting, starts[setting.seed]) for setting in settings if setting not in done]
        run_missing(learn, jobs, rows, args.out / "runs.jsonl", args.jobs, lambda row: f"{row['method']} {row['lr']:g}")
        save()
        print_table(summary(rows), list(summary(rows)[0]))


if __name__ == "__main__":
    main()
