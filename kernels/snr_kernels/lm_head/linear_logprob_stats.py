"""The op's door: `linear_logprob_stats`, which gives what `logprob_stats` says of the logits, and its backward pass.

``_tiles`` cuts the logits into slabs, ``_passes`` says what is done with each, and ``_merge`` joins slabs and ranks.
The products are torch's (cuBLAS on a GPU); the rest is one pass of `logprob_stats` over each slab.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from snr_kernels.checks import expect_names
from snr_kernels.dispatch import Impl
from snr_kernels.lm_head._passes import Kept, gradients, statistics
from snr_kernels.lm_head._tiles import Head, Options, prepare
from snr_kernels.logprob_stats import LogprobStats
from snr_kernels.logprob_stats.results import IGNORE_INDEX
from snr_kernels.precision import exactly


def linear_logprob_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    outputs: Collection[str] = LogprobStats._fields,
    slab_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    process_group: dist.ProcessGroup | None = None,
    first_label: int | None = None,
    impl: Impl = "auto",
) -> LogprobStats:
    r"""`logprob_stats` of ``scale (hidden weight^T + bias)``, without the logits.

    .. math::
        x = s\,(h W^\top + b), \quad x \leftarrow c \tanh(x / c), \quad p = \mathrm{softmax}(x / T)

    As for `logprob_stats`, ``hidden[..., t, :]`` must predict ``labels[..., t]``: shift one of them.

    Logits exist a slab at a time: a slice of the vocabulary for all tokens, multiplied by torch, reduced by
    `logprob_stats` and joined with what the other slices said. The backward pass multiplies again, but for the last
    slab, which is kept: with a slab as large as the logits nothing is computed twice, with a small one a third more
    than with whole logits; where 1024 columns of all tokens do not fit, tokens are divided too, and thin products are
    slow. Weight gradients are rounded once, gradients of hidden states are summed in float32.

    ``torch.autocast`` is followed: products in its dtype, gradients in those of the tensors. Under ``torch.compile``
    the graph is broken around the op (no ``fullgraph=True``). Differentiable once, in reverse mode; not by
    ``torch.func`` or in batches.

    With a ``process_group`` every rank has a slice of the vocabulary (its rows of ``weight`` and ``bias``), the same
    hidden states and the same labels; without one, a slice is taken for the whole vocabulary. Statistics are joined by
    one collective of eight numbers per token and rank, gradients of hidden states are summed over the ranks, and both
    are then the same on all of them; every rank must call backward.

    Args:
        hidden: ``[..., d]``, float64, float32, bfloat16 or float16. What ``reshape(-1, d)`` has to copy is copied.
        weight: ``[V, d]``, of the dtype of ``hidden``, or any under autocast.
        labels: ``[...]`` integers in ``[0, V)``, or ``ignore_index``. Tokens that are left out are multiplied like the
            others: where they are many, pass ``hidden[mask]``.
        temperature: positive divisor of the logits: a number, or a tensor, ``[]`` or ``[...]``, without gradient.
        bias: ``[V]``, any of those dtypes.
        softcap: ``c``, positive (Gemma 2); None for no cap.
        scale: ``s``, positive (Cohere's ``logit_scale``; ``1 / logits_scaling`` of Granite).
        ignore_index: label of the tokens to leave out: all outputs and gradients 0 (but NaN times 0 is NaN in the
            gradient of the weights, if their hidden states are not finite).
        outputs: names of the statistics to compute; the others are ``None``.
        slab_bytes: the most that logits, and copies of them and of weights in another dtype, may take at any time, and
            what is kept until the backward pass: at least a row of 1024 columns is taken. By default 1 GiB on a GPU
            and 64 MiB elsewhere. Further memory: results; in the backward pass gradients, and those of hidden states
            in float32 (twice on a GPU, if they are not); on a CPU buffers of 8 MB, and of 16 MB in low precision.
        logits_dtype: of the slab; by default that of the products, as a model has it (float32 with a softcap).
            ``torch.float32`` spares bfloat16 logits their rounding, by twice the traffic and half the columns.
        process_group: of the ranks that have the other rows of the vocabulary.
        first_label: the label of the first row of ``weight``; by default the rank in the group times the rows of
            ``weight``, which wants equal slices.
        impl: of `logprob_stats`: ``"torch"`` or ``"triton"`` to insist on one.

    Returns:
        float32 tensors (float64 for float64 inputs) of the shape of ``labels``. Tokens that have no answer are NaN, as
        in `logprob_stats`: so are those whose label is in no slice, or in two.

    Raises:
        TypeError: other dtypes than those, hidden and weight of two outside of autocast, labels that are not integers,
            a ``DTensor``.
        ValueError: shapes or devices that disagree, an empty vocabulary, a temperature, scale or softcap that is not
            positive and finite, unknown ``outputs`` or ``impl``, ``slab_bytes`` below 1, a group without this rank.

    Example:
        >>> hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> stats = linear_logprob_stats(hidden, weight, torch.tensor([1]), temperature=3.0)
        >>> [round(float(value), 4) for value in stats]  # of the logits 0 and 3
        [-0.3133, 0.5822, 0.6068, 0.1447]
    """
    asked = expect_names("outputs", outputs, LogprobStats._fields)
    squares = "sum_p_squared" in asked or "grad_norm_squared" in asked
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in (hidden, weight)):
        raise RuntimeError(
            "torch.func: not seen through; use linear_logprob_stats_reference, or logprob_stats of logits"
        )
    divisor, options = prepare(
        hidden, weight, labels, temperature, bias, softcap=softcap, scale=scale, ignore_index=ignore_index,
        slab_bytes=slab_bytes, logits_dtype=logits_dtype, process_group=process_group, first_label=first_label,
        impl=impl,
    )  # fmt: skip
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    found = _apply(hidden, weight, bias, labels, divisor, options, "entropy" in asked, squares, keep)
    values = [found[i].view(labels.shape) if name in asked else None for i, name in enumerate(LogprobStats._fields)]
    return LogprobStats(*values)


# -------------------------------------------------------------------------------------------------------- autograd
class _Statistics(torch.autograd.Function):
    """Saves its inputs, seven numbers per token and the last slab of logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        divisor: Tensor,
        options: Options,
        entropy: bool,
        squares: bool,
        keep: bool,
    ) -> tuple[Tensor, ...]:
        with exactly(hidden.device):
            head = Head.of(hidden, weight, bias, labels, divisor, options)
            results, kept = statistics(head, head.tiles(), entropy, squares)
        if keep:
            ctx.set_materialize_grads(False)
            ctx.options, ctx.ready = options, True
            ctx.save_for_backward(hidden, weight, bias, labels, divisor, kept and kept.buffer, *results)
        return results[:4]

    @staticmethod
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, divisor, buffer, *results = ctx.saved_tensors
        # The gradient is written over the logits, so a second backward pass has to multiply them again. `data` because
        # autograd would refuse that pass; it cannot know that nobody reads the slab again.
        kept, ctx.ready = None if buffer is None else Kept(buffer.data, ctx.ready), False
        with exactly(hidden.device):
            head = Head.of(hidden, weight, bias, labels, divisor, ctx.options)
            found = gradients(head, head.tiles(), results, given, kept, ctx.needs_input_grad[:3])
            of_hidden = None if found.hidden is None else found.hidden.view(hidden.shape).to(hidden.dtype)
        of_inputs = [of_hidden, found.weight, found.bias]
        if torch.is_grad_enabled():  # create_graph=True
            of_inputs = [None if g is None else _Once.apply(g, hidden, weight, bias, *given) for g in of_inputs]  # type: ignore[no-untyped-call]
        return *of_inputs, None, None, None, None, None, None


class _Once(torch.autograd.Function):
    """A gradient that depends on its inputs in a way that is not to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "linear_logprob_stats: differentiable once; for second derivatives use linear_logprob_stats_reference"
        )


@_disable_dynamo  # torch.compiler.disable would import the compiler here
def _apply(*arguments: Any) -> Sequence[Tensor]:
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in arguments[:2]):
        raise RuntimeError(
            "torch.func: not seen through; use linear_logprob_stats_reference, or logprob_stats of logits"
        )
    return cast("Sequence[Tensor]", _Statistics.apply(*arguments))  # type: ignore[no-untyped-call]
