"""Reinforcement learning on arithmetic by several processes: OBLR-PO under DDP or `fully_shard` (FSDP2).

    torchrun --nproc-per-node 2 -m examples.ddp_fsdp --parallel ddp     # or fsdp; gloo on CPUs, nccl on GPUs
    torchrun --nproc-per-node 2 -m examples.ddp_fsdp --parallel fsdp --resume   # go on where Ctrl-C stopped it
    python -m examples.ddp_fsdp                                         # one process

``train`` is the loop to copy. Every rank samples prompts of its own, whole groups of outputs. The baseline looks at the
outputs of all ranks, and every rank's every backward pass is a sub-batch of the noise estimate, so that all ranks get
the same learning rate.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from examples.common.arithmetic import is_correct, problems
from examples.common.options import Parser
from examples.common.policy import (
    Policy,
    local_model,
    logit_weights,
    sample,
    sequence_log_probs,
    tiny_qwen3,
    warm_start,
)
from examples.common.runs import (
    Row,
    expect_same_settings,
    interruptible,
    read_metrics,
    save_atomically,
    stop_requested,
    to_json,
)
from snr_optim import GradWeightedBaseline, SNRAdaptiveLR

CHECKPOINT = "checkpoint.pt"  # in the folder of a run
INDEPENDENT = ("steps", "out", "resume", "parallel", "every")  # what a resumed run may change
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of all ranks' shards; in memory, on rank 0


def train(args: argparse.Namespace, device: torch.device) -> None:
    """One run, the same function on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    saved = load(args)
    started = starting_policy(args, device, trained=saved is not None)
    if started is None:
        return  # Ctrl-C in the warm start
    policy, tokenizer = started
    model = parallelised(policy, args.parallel, device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 20, total_iters=20)
    scheduler = SNRAdaptiveLR(optimizer, schedule=warm_up)
    baseline = GradWeightedBaseline(process_group=dist.group.WORLD)
    first = 0
    if saved is not None:
        # After the schedulers, whose initial_lr it expects; before attach(), since it makes the optimizer's state by a
        # step of lr 0.
        set_state_dict(
            model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"], options=WHOLE
        )
        scheduler.load_state_dict(saved["scheduler"])
        baseline.load_state_dict(saved["baseline"])
        first = saved["step"] + 1
    scheduler.attach(model)  # the wrapped model

    for step in range(first, args.steps):
        batch = problems(args.prompts, args.seed, step)[rank::world]  # prompts of this rank
        torch.manual_seed(random.Random(f"sampling {args.seed} {step} {rank}").getrandbits(63))
        rollout, texts = sample(policy, tokenizer, batch, args.group_size, args.max_new_tokens)
        rewards = torch.tensor([is_correct(text, batch[i // args.group_size]) for i, text in enumerate(texts)]).float()
        rewards = rewards.to(device)

        # A forward pass of their own: advantages need the weights of all micro-batches, whose graphs would otherwise
        # have to be kept until then.
        weights = logit_weights(policy, rollout)
        # Whole groups are on one rank, so their size is enough; groups that are split need ids.
        advantages = baseline.advantages(rewards, weights, groups=args.group_size, update=True)

        size = len(rewards) // args.micro_batches  # whole prompts: the independent unit
        for start in range(0, len(rewards), size):
            micro = {name: tensor[start : start + size] for name, tensor in rollout.items()}
            with gradient_sync(model, last=start + size == len(rewards)):
                log_probs = sequence_log_probs(model, micro)
                # Over this rank's outputs: DDP and fully_shard take the mean over ranks.
                (-(advantages[start : start + size] * log_probs).sum() / len(rewards)).backward()

        optimizer.step()  # its lr is set from the moments of this very batch, of all ranks
        measured = scheduler.metrics()
        scheduler.step()
        optimizer.zero_grad()

        reward, stop = over_ranks(rewards.mean() / world, stop_requested(), device=device)
        if rank == 0:
            log(args, {"step": step, "reward": reward} | measured)
        last = stop > 0 or step == args.steps - 1  # all ranks stop after the same step
        if last or (step + 1) % args.every == 0:
            save(args, step, model, optimizer, scheduler=scheduler, baseline=baseline)
        if last:
            return


def starting_policy(args: argparse.Namespace, device: torch.device, trained: bool) -> Policy | None:
    """A local model, or the small Qwen3 that rank 0 has warmed up; the same weights on all ranks.

    Args:
        args: of the command line.
        device: of this rank.
        trained: a checkpoint will bring the weights.

    Returns:
        None after Ctrl-C.
    """
    if args.model:
        return local_model(str(args.model), str(device))
    model, tokenizer = tiny_qwen3(args.seed)
    model.to(device)
    interrupted = False
    if not trained and dist.get_rank() == 0:
        print(f"warm start: {args.warm_start_steps} supervised steps", flush=True)
        interrupted = not warm_start(model, tokenizer, args.warm_start_steps, args.seed, on_row=lambda row: None)
    [interrupted] = over_ranks(interrupted, device=device)
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)
    return None if interrupted else (model, tokenizer)


def parallelised(policy: Any, parallel: str, device: torch.device) -> nn.Module:
    """The model to train with: DDP around the policy, or the policy itself, sharded."""
    if parallel == "ddp":
        return DistributedDataParallel(policy, device_ids=[device.index] if device.type == "cuda" else None)
    blocks = set(policy._no_split_modules or [])  # Hugging Face's names of the classes of its decoder layers
    for module in list(policy.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module)
    fully_shard(policy)
    # Every forward pass gathers the weights of all ranks, so all have to do equally many: a rank whose outputs have
    # all ended goes on until the last rank's have, too. Its samples are not changed by that.
    policy.generate = partial(policy.generate, synced_gpus=dist.get_world_size() > 1)
    return policy  # type: ignore[no-any-return]


def gradient_sync(model: Any, last: bool) -> AbstractContextManager[None]:
    """Reduce gradients over the ranks in the last micro-batch alone."""
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    model.set_requires_gradient_sync(last)
    return nullcontext()


def over_ranks(*numbers: Tensor | float, device: torch.device) -> list[float]:
    """The sum of each number over all ranks."""
    total = torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])
    dist.all_reduce(total)
    return total.tolist()  # type: ignore[no-any-return]


# -- on disk: metrics.jsonl and checkpoint.pt, in a folder that all ranks see ------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, str]:
    """What a run depends on, the number of processes included: a resumed run must have the same."""
    own = {name: str(value) for name, value in vars(args).items() if name not in INDEPENDENT}
    return own | {"processes": str(dist.get_world_size())}


def save(args: argparse.Namespace, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, **parts: Any) -> None:
    """Everything that the next step depends on. Whole weights, so DDP and FSDP resume from one another's.

    Models that do not fit into the memory of rank 0 are for ``torch.distributed.checkpoint.save``.
    """
    weights, state = get_state_dict(model, optimizer, options=WHOLE)  # all ranks take part
    if dist.get_rank() == 0:
        checkpoint = {"model": weights, "optimizer": state, "step": step, "settings": settings(args)}
        # Scheduler and baseline are the same on all ranks.
        checkpoint |= {name: part.state_dict() for name, part in parts.items()}
        save_atomically(checkpoint, args.out / CHECKPOINT)
    dist.barrier()


def load(args: argparse.Namespace) -> dict[str, Any] | None:
    """The checkpoint to go on from; the metrics of later steps are dropped, or of all where there is none."""
    saved = None
    if args.resume:
        saved = torch.load(args.out / CHECKPOINT, weights_only=True, map_location="cpu", mmap=True)
        expect_same_settings(args.out, settings(args), saved["settings"])
    dist.barrier()  # no rank has refused
    if dist.get_rank() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_metrics(args.out) if saved is not None and row["step"] <= saved["step"]]
        (args.out / "metrics.jsonl").write_text("".join(map(to_json, rows)))
    return saved


def log(args: argparse.Namespace, row: Row) -> None:
    """One line for the file, one for the reader; of rank 0."""
    with (args.out / "metrics.jsonl").open("a") as file:
        file.write(to_json(row))
    line = "step {step:4.0f}  reward {reward:.3f}  lr {lr:.1e}  factor {factor:.2f}  SNR {snr:+.2f}"
    print(line.format(**row), flush=True)


# -- processes and options ---------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None, processes: int = 1) -> argparse.Namespace:
    parser = Parser(description="Reinforcement learning of a small Qwen3 on arithmetic, by several processes.")
    add = parser.add_argument
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="DistributedDataParallel, or fully_shard (FSDP2)")
    add("--steps", type=int, default=200, help="RL steps")
    add("--prompts", type=int, default=32, help="prompts per step, over all processes")
    add("--group-size", type=int, default=8, help="sampled outputs per prompt")
    add("--micro-batches", type=int, default=4, help="backward passes per step of each process")
    add("--lr", type=float, default=1e-3, help="ceiling of the learning rate")
    add("--max-new-tokens", type=int, default=7, help="length of an output")
    add("--warm-start-steps", type=int, default=500, help="supervised steps before RL")
    add("--seed", type=int, default=0)
    add("--model", type=Path, help="folder of a Hugging Face causal LM, instead of the built-in tiny Qwen3")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, default=Path("runs/ddp_fsdp"), help="folder for metrics and checkpoint, seen by all ranks")
    add("--every", type=int, default=50, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on with the run in --out, bit for bit")
    args = parser.parse_args(argv)

    parser.expect_at_least(
        args, steps=1, prompts=2, group_size=2, micro_batches=1, max_new_tokens=1, warm_start_steps=1, every=1
    )
    if processes * args.micro_batches < 2:
        parser.error("--micro-batches: expected at least 2 in one process, where one says nothing about noise")
    if args.prompts % (processes * args.micro_batches):
        parser.error(
            f"--prompts: expected a multiple of {processes} processes x {args.micro_batches} micro-batches, "
            f"got {args.prompts}"
        )
    parser.expect_positive_lr(args)
    parser.expect_model_folder(args)
    parser.expect_folder(args)
    checkpoint = args.out / CHECKPOINT
    if args.resume and not checkpoint.is_file():
        parser.error(f"--resume: there is no checkpoint in {args.out}")
    if checkpoint.is_file() and not args.resume:
        parser.error(f"--out: {args.out} has a checkpoint; add --resume to go on from it, or choose another folder")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: 'cuda' is not available here")
    if args.parallel == "fsdp" and args.device == "cpu" and torch.__version__.startswith("2.6"):
        parser.error("--parallel: fully_shard on a CPU needs a torch newer than 2.6; use ddp")
    return args


def start(args: argparse.Namespace) -> torch.device:
    """Join the processes that torchrun has started, or be the only one; where this rank computes."""
    options: dict[str, Any] = {"backend": "gloo"}
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        options = {"backend": "nccl", "device_id": device}
    if "RANK" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**options)
    return device


def main() -> None:
    args = parse_arguments(processes=int(os.environ.get("WORLD_SIZE", 1)))
    device = start(args)
    with interruptible():  # torchrun hands Ctrl-C on to all ranks, and kills what has not ended after a while
        train(args, device)
    # Not where a rank has failed: the others may be waiting for it, and torchrun ends them.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    if "RANK" in os.environ:
        # Threads of gloo outlive the process group, and one that still holds a tensor when the interpreter shuts down
        # aborts it ("terminate called without an active exception"): now and then, on a busy machine.
        sys.stdout.flush()
        os._exit(0)
