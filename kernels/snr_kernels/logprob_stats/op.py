"""The op's door: its function, checks of its arguments, and its registration with torch.

The two paths that compute it are next door: ``_torch``, and ``_triton``, which is imported when the first GPU tensor
comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import Tensor

from snr_kernels.checks import expect_integers, expect_names
from snr_kernels.dispatch import Impl
from snr_kernels.logprob_stats.paths import path_of
from snr_kernels.logprob_stats.results import IGNORE_INDEX, LogprobStats, temperature_tensor
from snr_kernels.precision import exact_dtype


def logprob_stats(
    logits: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    ignore_index: int = IGNORE_INDEX,
    outputs: Collection[str] = LogprobStats._fields,
    impl: Impl = "auto",
) -> LogprobStats:
    r"""Log-prob, entropy, ``sum p^2`` and ``||e_y - p||^2`` of each token, in one pass over the vocabulary.

    .. math::
        \|e_y - p\|^2 = (1 - p_y)^2 + \sum_{v \neq y} p_v^2, \qquad 1 - p_y = \sum_{v \neq y} p_v

    The usual ``1 - 2 p_y + sum p^2`` cancels in float32: 24 % wrong at ``1 - p_y = 3e-4``, never positive
    below ``1e-4``. Summing over what is left never does, nor do ``log p_y`` and the entropy where the label is
    the confident token. Where another is, entropy and the gradients of all but ``log_prob`` are right to about 1e-7
    absolutely; so are they near the uniform distribution, where they vanish.

    CUDA and ROCm tensors in float32, bfloat16 and float16 go to Triton kernels if the package ``triton`` is there
    (each logit read once, and in the backward pass read and written once), all others to torch, a few rows at a
    time: neither makes a float32 copy of the logits. No value is read back from a GPU.

    The gradient with respect to the logits exists for all four outputs, in reverse mode and once: for forward-mode
    or second derivatives use :func:`logprob_stats_reference`. ``torch.compile`` works, and so do ``torch.func.vmap``,
    ``grad`` and ``jacrev``, but neither inside the other, nor ``is_grads_batched``. On a GPU few rows are summed in
    more slices than many: the same row in another batch may differ by rounding.

    Args:
        logits: ``[..., V]``, any floating dtype, any strides; ``-inf`` for tokens that cannot be. With a last stride
            other than 1, or leading dimensions that no two strides describe, a contiguous copy is made.
        labels: ``[...]`` integers in ``[0, V)``, or ``ignore_index``.
        temperature: positive divisor of the logits: a number, or a tensor, ``[]`` or ``[...]``, without gradient.
        ignore_index: label of the rows to leave out: all outputs and gradients 0, logits not read. Masking the outputs
            of rows with another label outside ``[0, V)`` is not enough: their gradient stays NaN.
        outputs: names of the statistics to compute; the others are ``None`` and cost nothing.
        impl: ``"torch"`` or ``"triton"`` to insist on one.

    Returns:
        float32 tensors (float64 for float64 logits), whatever the dtype of the logits. Rows that have no answer are
        NaN in all outputs and in the gradient, and do not touch the others: NaN or ``+inf`` among the logits, none
        above ``-inf``, a label outside ``[0, V)``, an entry of a temperature tensor that is not
        positive and finite. (Nothing is raised for those, as it would take waiting for the GPU.)

    Raises:
        TypeError: logits or temperature not floating, labels not integers.
        ValueError: shapes or devices that disagree, an empty vocabulary, a temperature that is a number but not
            positive and finite or that wants a gradient, unknown ``outputs`` or ``impl``, ``impl="triton"`` where
            it cannot run.

    Example:
        >>> stats = logprob_stats(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        >>> [round(float(value), 4) for value in stats]
        [-0.6931, 0.6931, 0.5, 0.5]
        >>> logprob_stats(torch.tensor([[0.0, 30.0]]), torch.tensor([1]), outputs=["grad_norm_squared"])
        LogprobStats(log_prob=None, entropy=None, sum_p_squared=None, grad_norm_squared=tensor([1.7513e-26]))
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating dtype, got {logits.dtype}")
    expect_integers("labels", labels)
    if logits.dim() == 0 or logits.shape[-1] == 0 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits, labels: expected [..., V] and [...], got {list(logits.shape)} and {list(labels.shape)}"
        )
    if labels.device != logits.device:
        raise ValueError(f"labels: expected the device of logits, {logits.device}, got {labels.device}")
    outputs = expect_names("outputs", outputs, LogprobStats._fields)
    squares = "sum_p_squared" in outputs or "grad_norm_squared" in outputs
    divisor = temperature_tensor(temperature, labels, exact_dtype(logits))
    op: Callable[..., Any] = _forward if torch.compiler.is_compiling() else _Statistics.apply
    found = op(logits, labels.long(), divisor, ignore_index, "entropy" in outputs, squares, impl)
    values = [found[i] if name in outputs else None for i, name in enumerate(LogprobStats._fields)]
    return LogprobStats(*values)


# ------------------------------------------------------------------------------------------ registration with torch
_ARGUMENTS = "Tensor logits, Tensor labels, Tensor temperature, int ignore_index"


def as_rows(x: Tensor) -> Tensor:
    """``[..., V]`` as ``[outer, inner, V]`` with last stride 1: a view, unless the strides allow none."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    leading, vocab = x.shape[:-1], x.shape[-1]
    for cut in range(len(leading) + 1):  # a slice such as logits[:, :-1] has no [N, V] view, but an [outer, inner, V]
        try:
            return x.view(math.prod(leading[:cut]), math.prod(leading[cut:]), vocab)
        except RuntimeError:
            pass
    return x.reshape(1, math.prod(leading), vocab)


def _flat(x: Tensor) -> Tensor:
    """``[rows]`` with stride 1, which ``reshape`` alone does not promise."""
    return x.reshape(-1).contiguous()


def _as_rows(logits: Tensor, labels: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As both paths take them: ``[outer, inner, V]``, ``[rows]``, and ``[rows]`` or ``[]``."""
    return as_rows(logits), _flat(labels), _flat(temperature) if temperature.dim() else temperature


@torch.library.custom_op(
    "snr_kernels::logprob_stats",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, bool entropy, bool squares, str impl) -> (" + ", ".join(["Tensor"] * 7) + ")",
)
def _forward(
    logits: Tensor, labels: Tensor, temperature: Tensor, ignore_index: int, entropy: bool, squares: bool, impl: str
) -> tuple[Tensor, ...]:
    """The four statistics, with a last dimension of 0 where not asked for, and what the backward pass needs of a row.

    That is log-sum-exp in two parts, a reference near the largest logit and the rest, in units of the path's own, so
    that neither large logits nor low temperatures cost the gradient any digits; and ``1 - p_y``.
    """
    results = _empty_results(labels, temperature, entropy, squares)
    path, arguments = path_of(cast("Impl", impl), logits), _as_rows(logits, labels, temperature)
    path.forward(*arguments, ignore_index, [result.view(-1) for result in results], entropy, squares)
    return results


def _empty_results(labels: Tensor, temperature: Tensor, entropy: bool, squares: bool) -> tuple[Tensor, ...]:
    asked = (True, entropy, squares, squares, True, True, True)
    return tuple(temperature.new_empty(labels.shape if each else (*labels.shape, 0)) for each in asked)


@_forward.register_fake
def _(
    logits: Tensor, labels: Tensor, temperature: Tensor, ignore_index: int, entropy: bool, squares: bool, impl: str
) -> tuple[Tensor, ...]:
    return _empty_results(labels, temperature, entropy, squares)


@torch.library.custom_op(
    "snr_kernels::logprob_stats_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor[] results, Tensor?[] gradients, str impl) -> Tensor",
)
def _backward(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ignore_index: int,
    results: list[Tensor],
    gradients: list[Tensor | None],
    impl: str,
) -> Tensor:
    path, arguments = path_of(cast("Impl", impl), logits), _as_rows(logits, labels, temperature)
    known, given = [_flat(result) for result in results], [None if g is None else g.reshape(-1) for g in gradients]
    gradient: Tensor = path.backward(*arguments, ignore_index, known, given)
    return gradient.view(logits.shape)


@_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, temperature, ctx.ignore_index, _, _, ctx.impl = inputs
    ctx.set_materialize_grads(False)  # a statistic that no loss uses stays None, and its terms are left out
    ctx.save_for_backward(logits, labels, temperature, *output)


def _differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, labels, temperature, *results = ctx.saved_tensors
    given = [g if g is not None and g.shape == labels.shape else None for g in gradients[:4]]
    inputs = (logits, labels, temperature, ctx.ignore_index, ctx.impl, *results, *given)
    gradient: Tensor = _Gradient.apply(*inputs)  # type: ignore[no-untyped-call]
    return gradient, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


class _Statistics(torch.autograd.Function):
    """The op as `torch.func` differentiates and maps it, which does not see what is registered with an op."""

    @staticmethod
    def forward(*arguments: Any) -> Any:
        return _forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return _differentiate(ctx, *gradients)

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Any) -> Any:
        return _Statistics.apply(*_batched(info, dims, inputs)), (0,) * 7  # type: ignore[no-untyped-call]


class _Gradient(torch.autograd.Function):
    """Its backward pass, likewise."""

    @staticmethod
    def forward(
        logits: Tensor, labels: Tensor, temperature: Tensor, ignore_index: int, impl: str, *tensors: Tensor | None
    ) -> Any:
        results = cast("list[Tensor]", list(tensors[:7]))
        return _backward(logits, labels, temperature, ignore_index, results, list(tensors[7:]), impl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("logprob_stats: differentiable once; for second derivatives use logprob_stats_reference")

    @staticmethod
    def vmap(info: Any, dims: Any, *inputs: Any) -> Any:
        return _Gradient.apply(*_batched(info, dims, inputs)), 0  # type: ignore[no-untyped-call]


def _batched(info: Any, dims: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Inputs of an op with all batch dimensions in front: of the logits, and of what is one number a token."""

    def in_front(x: Tensor, dim: int | None) -> Tensor:
        return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)

    def per_token(x: Tensor, dim: int | None) -> Tensor:
        x = in_front(x, dim)
        if not x.numel():  # not asked for
            return x
        return x.reshape(*x.shape, *[1] * (logits.dim() - 1 - x.dim())).expand(logits.shape[:-1])

    logits = in_front(inputs[0], dims[0])
    rest = zip(inputs[1:], dims[1:], strict=True)
    return [logits, *(per_token(x, dim) if isinstance(x, Tensor) else x for x, dim in rest)]
