"""The slow twin of ``PerSampleGradNorms``: exact norms for every sample of any module, through ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from snr_kernels.precision import exact_dtype


def per_sample_grad_norms_func(
    model: nn.Module,
    loss_fn: Callable[[Callable[..., Any], Any], Tensor],
    batch: Any,
    *,
    chunk_size: int | None = None,
) -> Tensor:
    r"""``||grad_theta loss_i||^2`` for every sample ``i``, over all trainable parameters.

    .. math::
        w_i = \sum_{\theta} \|\nabla_\theta\, \ell(\theta; x_i)\|^2

    The gradient of each sample is built in full (``vmap(grad(...))``): memory is ``chunk_size`` times the
    trainable parameters. Tied parameters count once, with their whole gradient; frozen ones do not count.

    Args:
        model: any module whose forward ``torch.func`` can trace: no in-place state, no data-dependent branch.
            Hugging Face models want ``attn_implementation="eager"``.
        loss_fn: ``loss_fn(model, sample) -> scalar``, the function that you would write for a batch:
            ``sample`` is the batch cut to one sample, its leading dimension kept (size 1), and ``model`` is called
            as usual. For policy gradients return the *sum* of the token log-probs.
        batch: a tensor, or nested dicts, lists and tuples of tensors, all with leading dimension ``B``.
        chunk_size: how many samples to take at a time; all by default.

    Returns:
        ``[B]``, float32 (float64 for a float64 model).

    Raises:
        TypeError: ``batch`` holds something other than tensors.
        ValueError: there is no trainable parameter or no tensor, leading dimensions disagree, ``chunk_size < 1``,
            or the loss is not a scalar.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        >>> per_sample_grad_norms_func(model, lambda model, x: model(x).sum(), x)
        tensor([25.,  1.])
    """
    leaves = pytree.tree_leaves(batch)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        kinds = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)})
        raise TypeError(f"batch: expected nothing but tensors, got {', '.join(kinds)}")
    sizes = {leaf.shape[:1] for leaf in leaves}
    if len(sizes) != 1 or sizes == {torch.Size()}:
        raise ValueError(
            "batch: expected tensors with one leading batch dimension, "
            f"got shapes {[list(leaf.shape) for leaf in leaves]}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size: expected a positive number of samples, got {chunk_size}")
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("model: expected at least one parameter with requires_grad")
    exact = exact_dtype(*parameters.values())
    if leaves[0].shape[0] == 0:
        return torch.zeros(0, dtype=exact, device=leaves[0].device)

    def sample_loss(trainable: dict[str, Tensor], sample: Any) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(model, trainable, args, kwargs)

        loss = loss_fn(call, pytree.tree_map(lambda leaf: leaf.unsqueeze(0), sample))
        if loss.dim():
            raise ValueError(f"loss_fn: expected a scalar for a batch of one, got shape {list(loss.shape)}")
        return loss

    def squared_norm(sample: Any) -> Tensor:
        gradients = torch.func.grad(sample_loss)(parameters, sample)
        return torch.stack([g.to(exact).square().sum() for g in gradients.values()]).sum()

    norms: Tensor = torch.func.vmap(squared_norm, chunk_size=chunk_size)(batch)
    return norms
