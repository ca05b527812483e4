"""`linear_logprob_stats` against its peers: time, peak memory, error, and the share of the machine's limit reached.

    python -m benchmarks.linear_logprob_stats                   # on a GPU heads of Qwen3-4B and 8B, on a CPU smaller
    python -m benchmarks.linear_logprob_stats --rows 4096 --widths 2560 --dtypes bfloat16 float32

Peers that are installed are measured in the same run, each by its own functions, ours with the outputs that they give
and gradients of those that they differentiate; what else differs is said at each. Gradients per token and output are
given when the forward pass is over, as by any loss. Ops that know their loss before cannot take part: Liger's GRPO,
preference and divergence losses. The log-probability that its GRPO loss is made of can.

The limit is the rate of a matmul: one product forward, two backward, none for logits that are computed again.
`extra_mib` is the peak without the gradients of hidden states and weights. Errors are against float64 products of the
same hidden states and weights, so rounded logits count: `worst_error` is the largest relative error of a value (an
entropy below 1e-3 counts as that), `gradient_error` that of a whole gradient, in Frobenius norm. Half of the rows are
confident, as after reinforcement learning.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import logprob_stats
from benchmarks.harness import (
    Limits,
    Row,
    attempt,
    conclude,
    copies,
    environment,
    left_out,
    measure_limits,
    mebibytes,
    parse_arguments,
    peak_memory,
    progress,
    time_calls,
    version,
    write_json,
)
from benchmarks.roofline import Cost, linear_logprob_stats_cost
from snr_kernels.lm_head import (
    linear_logprob_stats,
    linear_logprob_stats_reference,
)
from snr_kernels.logprob_stats import LogprobStats

NAME = "linear_logprob_stats"
ALL = LogprobStats._fields
COLUMNS = ["dtype", "width", "outputs", "implementation", "pass", "ms", "host_ms", "of_limit"]
COLUMNS += ["peak_mib", "extra_mib", "worst_error", "gradient_error", "refused"]
DTYPES = {"cpu": ["float32"], "cuda": ["bfloat16"], "small": ["bfloat16"]}
ROWS = {"cpu": 1024, "cuda": 8192, "small": 15}
WIDTHS = {"cpu": [1024], "cuda": [2560, 4096], "small": [16]}
VOCAB = {"cpu": 32_000, "cuda": 151_936, "small": 300}
SECONDS = {"cpu": 1.0, "cuda": 1.0, "small": 0.0}
SLABS = {"cpu": (8 << 20, 128 << 20), "cuda": (128 << 20, 4 << 30)}  # an eighth of the default, and all logits
CHECKED = slice(None, None, 7)  # rows that are compared with float64: of every chunk, confident and not


class Data(NamedTuple):
    """The arguments, and a gradient per token for each of `ALL`."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    given: Tensor


class Task(NamedTuple):
    """What an implementation gives, and which of it has no gradient."""

    outputs: tuple[str, ...]
    constants: tuple[str, ...] = ()

    def differentiate(
        self, values: Sequence[Tensor], leaves: tuple[Tensor, Tensor], given: Tensor
    ) -> tuple[Tensor, ...]:
        """The gradients of the leaves, from those that are ``given`` for each of `ALL`."""
        named = zip(self.outputs, values, strict=True)
        wanted = {name: value for name, value in named if name not in self.constants}
        gradients = [given[ALL.index(name)].to(value.dtype) for name, value in wanted.items()]
        return torch.autograd.grad(list(wanted.values()), leaves, gradients)


class Implementation(NamedTuple):
    """``call(hidden, weight, labels)`` gives the outputs of the task, in this order."""

    name: str
    task: Task
    call: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]

    def forward(self, data: Data) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.call(data.hidden, data.weight, data.labels)

    def forward_backward(self, data: Data) -> tuple[Tensor, ...]:
        """The gradients of hidden states and weights."""
        leaves = data.hidden.detach().requires_grad_(), data.weight.detach().requires_grad_()
        return self.task.differentiate(self.call(*leaves, data.labels), leaves, data.given)


LOG_PROB, ENTROPY, EVERYTHING = Task(ALL[:1]), Task(ALL[:2]), Task(ALL)


# ------------------------------------------------------------------------------------------------- implementations
def implementations(device: torch.device, dtype: torch.dtype) -> list[Implementation]:
    """Ours and whatever else is installed, task by task."""
    found = [*verl(device), *trl(), *liger(device), *cut_cross_entropy(device), *plain_torch()]
    tasks = sorted({peer.task for peer in found}, key=lambda task: len(task.outputs))
    return [
        which
        for task in tasks
        for which in (*ours(task, device, dtype), *(peer for peer in found if peer.task == task))
    ]


def ours(task: Task, device: torch.device, dtype: torch.dtype) -> list[Implementation]:
    def implementation(variant: str, **options: Any) -> Implementation:
        def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            stats = linear_logprob_stats(hidden, weight, labels, outputs=task.outputs, **options)
            return tuple(getattr(stats, name) for name in task.outputs)

        return Implementation(f"snr-optim{variant}", task, call)

    found = [implementation("")]
    if task in (LOG_PROB, EVERYTHING):
        found += [implementation(f", {slab >> 20} MiB", slab_bytes=slab) for slab in SLABS[device.type]]
    if dtype.itemsize < 4:
        found.append(implementation(", float32 logits", logits_dtype=torch.float32))
    return found


def plain_torch() -> list[Implementation]:
    """All logits, rounded to the dtype of the hidden states, and a few float32 copies; as one would write it."""

    def everything(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return logprob_stats.plain(hidden @ weight.T, labels)

    def log_prob(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        log_p = (hidden @ weight.T).float().log_softmax(-1)
        return (log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1),)

    return [
        Implementation(name, task, way(call))
        for task, call in ((LOG_PROB, log_prob), (EVERYTHING, everything))
        for name, way in ((f"torch {torch.__version__}", lambda f: f), ("torch.compile", compiled))
    ]


def compiled(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(function, dynamic=False)


def verl(device: torch.device) -> list[Implementation]:
    """Torch, 512 tokens at a time: logits and entropy are rounded, weight gradients summed over chunks in their dtype.

    The Triton kernels, for a GPU and widths that are multiples of 128, round no logits, and sum the gradient of the
    hidden states over slices of the vocabulary in its dtype.
    """
    try:
        from verl.utils.experimental.torch_functional import FusedLinearForPPO
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
    except Exception as error:  # one that is there, but not for this torch, fails in its own way
        return left_out("verl", error)
    name, chunked = f"verl {version('verl')}", FusedLinearForPPO()
    found = [Implementation(name, ENTROPY, chunked)]
    if device.type == "cuda":
        found.append(Implementation(f"{name} triton", ENTROPY, lambda *a: linear_cross_entropy(*a, 1.0, "none")))
    return found


def trl() -> list[Implementation]:
    """What a model projects by after `add_fused_lm_head`: 4096 tokens by 32,768 columns at a time.

    Logits are rounded, gradients summed in float32 copies; ``log sum p^2`` has no gradient.
    """
    try:
        from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction
        from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE
    except Exception as error:
        return left_out("trl", error)
    if not {"entropy", "log_sum_sq_probs"} <= set(OPTIONAL_OUTPUTS):
        return []

    def implementation(task: Task, *asked: str) -> Implementation:
        def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, asked)
            log_prob, entropy, log_squares, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, labels, *options)
            return (log_prob, entropy, None if log_squares is None else log_squares.exp())[: len(task.outputs)]

        return Implementation(f"trl {version('trl')}", task, call)

    return [
        implementation(LOG_PROB),
        implementation(ENTROPY, "entropy"),
        implementation(Task(ALL[:3], constants=("sum_p_squared",)), "entropy", "log_sum_sq_probs"),
    ]


def liger(device: torch.device) -> list[Implementation]:
    """Three ops that round the logits.

    "chunks" is what the GRPO loss is made of, in torch: 2048 tokens by 4096 columns at a time, products in float32
    backward. "scaled" has the entropy too: kernels in bfloat16 on Hopper, with a float16 copy of the logits, and verl's
    rule elsewhere. "cross-entropy", for a GPU: a few tokens by all columns at a time. The last two sum weight gradients
    over chunks in their dtype.
    """
    try:
        from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except Exception as error:
        return left_out("liger-kernel", error)

    def chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return (LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, labels[None])[0],)

    def scaled(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels, 1.0, -100, 1, True)
        return -nll, entropy

    def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return (-liger_fused_linear_cross_entropy(hidden, weight, labels, reduction="none"),)

    name = f"liger {version('liger-kernel')}"
    found = [Implementation(f"{name} chunks", LOG_PROB, chunks), Implementation(f"{name} scaled", ENTROPY, scaled)]
    if device.type == "cuda":
        found.append(Implementation(f"{name} cross-entropy", LOG_PROB, cross_entropy))
    return found


def cut_cross_entropy(device: torch.device) -> list[Implementation]:
    """Logits in registers and float32, but products of that of the label are rounded; on a CPU compiled torch.

    The gradients are summed over blocks in their dtype. By default they lack blocks of small probabilities;
    "unfiltered" has them. Kernels differentiate in half precision only.
    """
    try:
        from cut_cross_entropy import linear_cross_entropy
    except Exception as error:
        return left_out("cut-cross-entropy", error)

    def implementation(variant: str, **options: Any) -> Implementation:
        def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            return (-linear_cross_entropy(hidden, weight, labels, reduction="none", **options),)

        return Implementation(f"cce {version('cut-cross-entropy')}{variant}", LOG_PROB, call)

    if device.type != "cuda":
        return [implementation(" torch_compile", impl="torch_compile")]
    return [implementation("", impl="cce"), implementation(" unfiltered", impl="cce", filter_eps=None)]


# ------------------------------------------------------------------------------------------------------------ data
def make_data(rows: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Data:
    """Random logits; every other row with ``1 - p_y`` between 1e-6 and 1."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    hidden, weight = normal(rows, width), (3 / math.sqrt(width) * normal(vocab, width)).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator, device=device)
    missing = 10 ** (-6 * torch.rand(rows, generator=generator, device=device))
    head = weight.float().T
    for some in torch.arange(0, rows, 2, device=device).split(512):
        index, direction = labels[some, None], weight[labels[some]].float()
        direction /= direction.square().sum(-1, keepdim=True)
        for _ in range(4):  # as the other logits move too
            logits = hidden[some] @ head
            others = logits.scatter(-1, index, -math.inf).logsumexp(-1, keepdim=True)
            level = others - torch.logit(missing[some, None], eps=1e-6)
            hidden[some] += (level - logits.gather(-1, index)) * direction
    return Data(hidden.to(dtype), weight, labels, normal(len(ALL), rows))


# ---------------------------------------------------------------------------------------------------------- errors
class Truth(NamedTuple):
    """In float64: the statistics of the rows that are checked, and the gradients that those rows give."""

    stats: LogprobStats
    gradients: tuple[Tensor, ...]


def truth_of(task: Task, data: Data) -> Truth:
    hidden, weight = data.hidden[CHECKED].double().requires_grad_(), data.weight.double().requires_grad_()
    stats = linear_logprob_stats_reference(hidden, weight, data.labels[CHECKED])
    values = [getattr(stats, name) for name in task.outputs]
    gradients = task.differentiate(values, (hidden, weight), data.given[:, CHECKED])
    return Truth(LogprobStats(*(value.detach() for value in stats)), gradients)


def errors(which: Implementation, data: Data, truth: Truth) -> tuple[float, float]:
    """Of the values and of the gradients; all rows are computed, those that are not checked are given gradients of 0.

    Raises:
        FloatingPointError: they are not finite.
    """
    of_values = []
    for name, value in zip(which.task.outputs, which.forward(data), strict=True):
        true = getattr(truth.stats, name)
        of_values.append(((value[CHECKED] - true) / (true.clamp_min(1e-3) if name == "entropy" else true)).abs().max())
    given = torch.zeros_like(data.given)
    given[:, CHECKED] = data.given[:, CHECKED]
    of_hidden, of_weight = which.forward_backward(data._replace(given=given))
    of_gradients = [
        (found - true).norm() / true.norm()
        for found, true in zip((of_hidden[CHECKED], of_weight), truth.gradients, strict=True)
    ]
    worst, gradient = (torch.stack(each).max().item() for each in (of_values, of_gradients))  # NaN if any is
    if not math.isfinite(worst + gradient):
        raise FloatingPointError("results that are not finite")
    return worst, gradient


# ------------------------------------------------------------------------------------------------------ measurement
def measure(which: Implementation, data: Data, truth: Truth, limits: Limits, seconds: float) -> list[Row]:
    """A row per pass, and one that says why there are no more."""
    (rows, width), vocab = data.hidden.shape, len(data.weight)
    about: Row = {
        "dtype": str(data.hidden.dtype).removeprefix("torch."), "rows": rows, "width": width, "vocab": vocab,
        "outputs": len(which.task.outputs), "names": list(which.task.outputs),
        "constants": list(which.task.constants), "implementation": which.name,
    }  # fmt: skip
    return attempt(about, rows_of(which, data, truth, limits, seconds), data.hidden.device)


def rows_of(which: Implementation, data: Data, truth: Truth, limits: Limits, seconds: float) -> Iterator[Row]:
    device, nbytes = data.hidden.device, data.hidden.nbytes + data.weight.nbytes
    worst, gradient = errors(which, data, truth)  # both passes are compiled and tuned now
    inputs = [data] + [
        data._replace(hidden=data.hidden.clone(), weight=data.weight.clone()) for _ in range(copies(nbytes) - 1)
    ]
    passes = {"forward": which.forward, "forward+backward": which.forward_backward}
    for (name, call), gradients in zip(passes.items(), (0, nbytes), strict=True):
        peak = peak_memory(partial(call, data), device)
        timing = time_calls(
            lambda turn, call=call: call(inputs[turn % len(inputs)]), device, seconds=seconds, warm_up=1
        )
        cost = cost_of(name, data)
        yield {
            "pass": name, "ms": timing.median, "ms_20": timing.low, "ms_80": timing.high, "calls": timing.calls,
            "host_ms": timing.host, "of_limit": 1e3 * cost.flops / limits.matmul / timing.median, "bytes": cost.bytes,
            "flops": cost.flops, "peak_mib": mebibytes(peak),
            "extra_mib": mebibytes(None if peak is None else peak - gradients),
            "worst_error": None if gradients else worst, "gradient_error": gradient if gradients else None,
        }  # fmt: skip


def cost_of(name: str, data: Data) -> Cost:
    sizes = (*data.hidden.shape, len(data.weight), data.hidden.dtype)
    each = [linear_logprob_stats_cost(*sizes, backward=part == "backward", recomputed=0.0) for part in name.split("+")]
    return Cost(*map(sum, zip(*each, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="tokens: 8192 on a GPU, 1024 on a CPU")
    parser.add_argument("--widths", type=int, nargs="+", help="of the hidden states: 2560 and 4096, or 1024")
    parser.add_argument("--vocab", type=int, help="151936 on a GPU, 32000 on a CPU")
    parser.add_argument("--dtypes", nargs="+", help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--seconds", type=float, help="of timing per pass: 1")
    args = parse_arguments(parser, NAME)
    kind = args.sizes
    seconds = SECONDS[kind] if args.seconds is None else args.seconds
    rows, vocab = args.rows or ROWS[kind], args.vocab or VOCAB[kind]
    shapes = list(itertools.product(args.dtypes or DTYPES[kind], args.widths or WIDTHS[kind]))
    where, limits = environment(args.device), measure_limits(args.device, kind)
    measured: list[Row] = []
    found = {dtype: implementations(args.device, getattr(torch, dtype)) for dtype, _ in shapes}
    with progress(sum(len(found[dtype]) for dtype, _ in shapes)) as done:
        for dtype, width in shapes:
            torch.compiler.reset()  # compiled functions remember only so many shapes
            data = make_data(rows, width, vocab, getattr(torch, dtype), args.device)
            for task, group in itertools.groupby(found[dtype], lambda which: which.task):
                truth = truth_of(task, data)
                for which in group:
                    measured += measure(which, data, truth, limits, seconds)
                    write_json(args.json, NAME, where, limits=limits, rows=measured)
                    done(f"{dtype} {width} {', '.join(task.outputs)}: {which.name}")
                del truth  # before the next takes as much
    print(f"{where['device']}: copy {limits.bandwidth / 1e9:,.0f} GB/s, matmul {limits.matmul / 1e12:,.2f} TFLOP/s")
    conclude(measured, COLUMNS, lambda row: row["implementation"].startswith("snr-optim"))


if __name__ == "__main__":
    main()
