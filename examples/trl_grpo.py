r"""TRL's GRPO with the two lines that make it OBLR-PO; from arithmetic on a laptop to a model and a file of problems.

    python -m examples.trl_grpo                                # a tiny Qwen3, arithmetic: a minute on a CPU, offline
    python -m examples.trl_grpo --method grpo --out runs/grpo  # TRL as it is, same seed, problems and settings
    python -m examples.trl_grpo --resume --steps 200           # go on where it ended, or where Ctrl-C stopped it
    torchrun --nproc-per-node 8 -m examples.trl_grpo --model Qwen/Qwen3-4B-Base --dataset train.jsonl \
        --num-generations 8 --prompts 128 --gradient-checkpointing --out runs/qwen3-4b

``make_trainer`` is the function to copy. Needs TRL: ``pip install '.[trl,examples]'`` in a checkout.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from examples.common import arithmetic, math_problems
from examples.common.options import Parser
from examples.common.policy import tiny_qwen3, warm_start
from examples.common.runs import expect_same_settings, interruptible, stop_requested, to_json
from snr_optim.integrations.transformers import SNRCallback
from snr_optim.integrations.trl import OBLRTrainerMixin, check_unbiased

DEFAULTS = {  # with the built-in task, with --model and --dataset
    "steps": (100, 500),
    "prompts": (32, 128),
    "micro_batches": (8, 16),
    "warm_up": (20, 20),
    "max_completion_length": (7, 1024),
}
LRS = {"oblr-po": (1e-3, 8e-6), "grpo": (2e-4, 1e-6)}  # the methods, and their defaults like those above
LAST = 20  # steps in the mean that is called the final reward
SHOWN = ("reward", "learning_rate", "snr/factor", "grad_norm", "completions/mean_length")


class OBLRTrainer(OBLRTrainerMixin, GRPOTrainer):  # line 1 of 2: advantages
    """TRL's trainer with advantages from the gradient-weighted baseline."""


def make_trainer(args: argparse.Namespace, model: Any, tokenizer: Any, data: Dataset, reward: Any) -> GRPOTrainer:
    """TRL's GRPO in settings with an unbiased gradient, with our two lines or, by ``--method grpo``, without."""
    trainer, callbacks = GRPOTrainer, []
    if args.method == "oblr-po":
        trainer, callbacks = OBLRTrainer, [SNRCallback()]  # line 2 of 2: the learning rate; args.lr is the ceiling
    return trainer(
        model, reward, make_config(args), train_dataset=data, processing_class=tokenizer, callbacks=callbacks
    )


def make_config(args: argparse.Namespace) -> GRPOConfig:
    gpu = torch.cuda.is_available()
    return GRPOConfig(
        output_dir=str(args.out), seed=args.seed, data_seed=args.seed, max_steps=args.steps,
        per_device_train_batch_size=args.prompts // (world_size() * args.micro_batches) * args.num_generations,
        gradient_accumulation_steps=args.micro_batches, num_generations=args.num_generations,
        max_completion_length=args.max_completion_length, learning_rate=args.lr, optim=args.optim,
        lr_scheduler_type="constant_with_warmup", warmup_steps=args.warm_up,
        # What check_unbiased() asks for. GRPO's own advantages need their division by the spread of the group.
        loss_type="luspo", scale_rewards="none" if args.method == "oblr-po" else "group",
        beta=0.0, disable_dropout=True, max_grad_norm=0.0,
        bf16=gpu, use_cpu=not gpu, gradient_checkpointing=args.gradient_checkpointing,
        model_init_kwargs={"dtype": args.dtype} if args.model else None, use_vllm=args.use_vllm,
        logging_steps=1, report_to=args.report_to, disable_tqdm=True, dataloader_drop_last=True,
        save_strategy="steps", save_steps=args.save_every, save_total_limit=2,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- the task and its reward


def arithmetic_task(args: argparse.Namespace, warm: bool) -> tuple[Any, Any, Dataset, Callable[..., list[float]]]:
    """The built-in one: a tiny Qwen3 that has seen the task, and problems as many as no run exhausts."""
    model, tokenizer = tiny_qwen3(args.seed)
    if warm:
        print(f"{args.warm_start_steps} supervised steps of warm start ...", flush=True)
        if not warm_start(model, tokenizer, args.warm_start_steps, args.seed, on_row=lambda row: None):
            raise SystemExit("stopped during the warm start")
    data = [{"prompt": each.prompt, "answer": each.answer} for each in arithmetic.problems(20_000, args.seed, step=0)]

    def reward(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        pairs = zip(completions, answer, strict=True)
        return [float(arithmetic.is_correct(text, arithmetic.Problem("", right))) for text, right in pairs]

    return model, tokenizer, Dataset.from_list(data), reward


def file_task(args: argparse.Namespace) -> tuple[str, Any, Dataset, Callable[..., list[float]]]:
    """A model by name, which TRL loads, and a JSONL file of problems."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --model: {args.model}: {str(error).splitlines()[0]}") from None
    try:
        found, bad = math_problems.load_problems(args.dataset, skip_bad=args.skip_bad_lines)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --dataset: {error}") from None
    if bad:
        print(f"{len(bad)} bad lines left out, the first: {bad[0]}", flush=True)
    chat = args.template == "chat" or (args.template is None and tokenizer.chat_template is not None)

    def prompt(question: str) -> Any:
        if chat:
            return [{"role": "user", "content": f"{question}\n{math_problems.INSTRUCTION}"}]
        return f"Question: {question}\n{math_problems.INSTRUCTION}\nAnswer:"

    def reward(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
        texts = [each if isinstance(each, str) else each[-1]["content"] or "" for each in completions]
        return [float(math_problems.is_correct(text, right)) for text, right in zip(texts, answer, strict=True)]

    data = [{"prompt": prompt(each.prompt), "answer": each.answer} for each in found]
    return args.model, tokenizer, Dataset.from_list(data), reward


# --------------------------------------------------------------------------------------------- what a run leaves


class Progress(TrainerCallback):
    """``metrics.jsonl``, a row per step, the same on the terminal; and the stop between two steps at Ctrl-C."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:  # steps that were done after the checkpoint are done again
            self.path.write_text("".join(to_json(row) for row in state.log_history if "reward" in row))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "reward" not in (logs or {}):
            return
        row = state.log_history[-1]
        with self.path.open("a") as file:
            file.write(to_json(row))
        shown = [f"{name.split('/')[-1]} {row[name]:.3g}" for name in SHOWN if isinstance(row.get(name), float)]
        print(f"step {row['step']:>4}  " + "  ".join(shown), flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if stop_requested():
            control.should_training_stop = control.should_save = True


def summary(args: argparse.Namespace, trainer: GRPOTrainer, seconds: float) -> dict[str, Any]:
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    return {
        "method": args.method,
        "steps": len(rewards),
        "final_reward": mean(rewards[-LAST:]),
        "seconds": seconds,
        "settings": settings(args),
        "biased_by": check_unbiased(trainer.args),
        "versions": {name: metadata.version(name) for name in ("snr-optim", "trl", "transformers", "torch")},
    }


def settings(args: argparse.Namespace) -> dict[str, str]:
    """What a run depends on, and a resumed one must have the same."""
    free = ("out", "resume", "steps", "save_every", "report_to")
    return {name: str(value) for name, value in vars(args).items() if name not in free}


# ------------------------------------------------------------------------------------------------- the command line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--method", choices=LRS, default="oblr-po", help="grpo: TRL as it is, all else equal")
    add("--model", help="folder or Hugging Face name, with --dataset (default: a tiny Qwen3, arithmetic)")
    add("--dataset", type=Path, help="JSONL of question and answer: GSM8K's, MATH's, or your own")
    add("--skip-bad-lines", action="store_true", help="leave out bad lines of --dataset instead of stopping there")
    add("--template", choices=("chat", "plain"), help="of the prompts (default: chat, if the tokenizer has one)")
    add("--seed", type=int, default=0)
    add("--steps", type=int, help="optimizer steps (default: 100; 500 with --model)")
    add("--prompts", type=int, help="prompts per step, of all processes (default: 32; 128 with --model)")
    add("--num-generations", type=int, default=8, help="sampled outputs per prompt")
    add("--micro-batches", type=int, help="backward passes per step and process (default: 8; 16 with --model)")
    add("--max-completion-length", type=int, help="tokens (default: 7; 1024 with --model)")
    add(
        "--lr", type=float,
        help="ceiling, the paper's eta_max; constant rate of grpo (default: best of benchmarks/trl_grpo.py for the "
        "tiny one; with --model TRL's 1e-6, and 8 times as much for the ceiling)",
    )  # fmt: skip
    add(
        "--optim",
        default="adamw_torch",
        choices=("adamw_torch", "adamw_torch_fused", "sgd"),
        help="as transformers does",
    )
    add("--warm-up", type=int, help="steps in which the ceiling rises to --lr (default: 20)")
    add("--warm-start-steps", type=int, default=500, help="supervised steps of the tiny Qwen3 before RL")
    add("--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the weights of --model; on a GPU, products are in bfloat16 in any case")  # fmt: skip
    add("--gradient-checkpointing", action="store_true")
    add("--use-vllm", action="store_true", help="sample with vLLM, at the price of a small bias")
    add("--save-every", type=int, default=50, help="steps between checkpoints")
    add("--report-to", choices=("none", "tensorboard", "wandb", "trackio"), default="none")
    add("--out", type=Path, default=Path("runs/trl_grpo"), help="folder for metrics, checkpoints, summary and model")
    add("--resume", action="store_true", help="go on with the run in --out")
    args = parser.parse_args(argv)

    if (args.model is None) != (args.dataset is None):
        parser.error("--model, --dataset: expected both, or none for the built-in task")
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[args.model is not None])
    args.lr = LRS[args.method][args.model is not None] if args.lr is None else args.lr
    parser.expect_at_least(
        args, steps=1, prompts=1, num_generations=2, micro_batches=1, warm_up=0, max_completion_length=1,
        warm_start_steps=1, save_every=1,
    )  # fmt: skip
    backward_passes = args.micro_batches * world_size()
    if backward_passes < 2 and args.method == "oblr-po":
        parser.error("--micro-batches: expected at least 2 in one process: one says nothing about noise")
    if args.prompts % backward_passes:
        parser.error(
            f"--prompts: expected a multiple of --micro-batches x processes = {backward_passes}, got {args.prompts}"
        )
    parser.expect_positive_lr(args)
    if args.dataset and not args.dataset.is_file():
        parser.error(f"--dataset: no file {args.dataset}")
    if args.use_vllm and importlib.util.find_spec("vllm") is None:
        parser.error("--use-vllm: vLLM is not installed")
    parser.expect_folder(args)
    if args.out.is_dir() and get_last_checkpoint(str(args.out)) and not args.resume:
        parser.error(f"--out: {args.out} has checkpoints; add --resume to go on from them, or choose another folder")
    return args


def world_size() -> int:
    """Processes that torchrun or accelerate have started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def last_checkpoint(args: argparse.Namespace) -> str | None:
    """Of a run in ``--out`` with the same settings."""
    checkpoint = get_last_checkpoint(str(args.out)) if args.out.is_dir() else None
    if args.resume and checkpoint is None:
        raise SystemExit(f"error: --resume: there is no checkpoint in {args.out}")
    if checkpoint is None:
        return None
    try:
        made_with = json.loads((args.out / "settings.json").read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: --resume: {args.out / 'settings.json'} cannot be read: {error}") from None
    expect_same_settings(args.out, settings(args), made_with)
    return checkpoint


def main() -> None:
    args = parse_arguments()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # one per step, about TRL's calls
    checkpoint = last_checkpoint(args)
    # Processes must stop at the same step, and torchrun gives them no time to agree: they go on from a checkpoint.
    with interruptible() if world_size() == 1 else nullcontext():
        task = file_task(args) if args.model else arithmetic_task(args, warm=checkpoint is None)
        trainer = make_trainer(args, *task)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Progress(args.out))
        first = trainer.is_world_process_zero()
        if first:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "settings.json").write_text(json.dumps(settings(args), indent=1) + "\n")
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(args.out / "model"))
    if first:
        result = summary(args, trainer, time.perf_counter() - started)
        (args.out / "summary.json").write_text(json.dumps(result, indent=1) + "\n")
        print(
            f"{args.method}: reward {result['final_reward']:.3f}, mean of the last {min(LAST, result['steps'])} steps; "
            f"metrics, summary and model in {args.out}"
        )
    # Only where all ranks have come here: the first of them writes while the others have nothing left to do.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
