"""Statistics of the log-probs of a whole causal language model, without its logits: its head is replaced for one call.

This works for models as Hugging Face writes them, whatever wraps them (LoRA, DDP, `fully_shard`, autocast): everything
up to the head runs as it always does, through the model's own ``forward``. Nothing here imports transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from snr_kernels.checks import expect_integers
from snr_kernels.dispatch import Impl
from snr_kernels.lm_head import linear_logprob_stats
from snr_kernels.logprob_stats import IGNORE_INDEX as IGNORE_INDEX
from snr_kernels.logprob_stats import LogprobStats
from snr_kernels.precision import exact_dtype
from snr_optim.after_head import (
    LogitChanges,
    LogitScaling,
    RepeatableCall,
    expect_changes,
    logits_of,
    placeholder_logits,
)
from snr_optim.grad_norms.replay import unobserved


def model_logprob_stats(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    outputs: Collection[str] = LogprobStats._fields,
    slab_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
    **inputs: Any,
) -> LogprobStats:
    r"""`linear_logprob_stats` of a causal LM: log-probs, entropies and their kin of all labels, without logits.

    .. math::
        \log p_t = \log \pi(y_t \mid x_{<t})

    The model is called as always, with its head replaced for this one call: hidden states of tokens that are to be
    predicted, and only those, go to `linear_logprob_stats` with the head's weights. This takes over what the model
    says: tied and untied heads, biases, ``final_logit_softcapping`` (Gemma), ``logit_scale`` (Cohere),
    ``logits_scaling`` (Granite), ``lm_head_multiplier`` (Falcon-H1) and ``unpadded_vocab_size``.

    Each call tries out what else the model or hooks do to the logits, on a few columns for every row and on all words
    for a row, while the layers only repeat what they returned. It then takes over factors of rows (a hook that sets a
    temperature for each sequence) and masks of words (padding of the vocabulary, image tokens), and refuses anything
    else. It cannot see what is done to single words in single rows; what depends on several logits, unless it shows on
    two rows of numbers; and, where the model looks words up by their numbers, what differs among the positions of a
    sequence. Hooks of the head, of the model and of what wraps it run three more times, on such numbers, and the host
    reads what they return, so that it waits for the device about a dozen times in a call. The result does not hold what
    a model adds to its loss, such as the loss of a router.

    While it runs, no other thread may call the model. Checkpoint the layers, or this call, but not the model within it.

    **Labels are not shifted**, as in Hugging Face's ``model(input_ids, labels=labels)``: position ``t`` of the result
    is about the token ``input_ids[:, t]``, given the tokens before ``t``.

    Args:
        model: a causal LM with ``get_output_embeddings()``, or a wrapper of one.
        input_ids: ``[B, T]`` integers.
        labels: ``input_ids``, with -100 for tokens that are not to be scored: prompt, padding, and the first token of
            every sequence if several are packed in a row. The first token of a row is never predicted.
        temperature: a number, or ``[B, T]`` like the labels.
        outputs: names of the statistics to compute; the others are ``None``.
        slab_bytes: passed to `linear_logprob_stats`, as are ``logits_dtype`` and ``impl``.
        logits_dtype: the precision of the slab.
        impl: which path of `logprob_stats` computes.
        inputs: what else the model takes: ``attention_mask``, ``position_ids``, ... ``use_cache`` is False by default.

    Returns:
        ``[B, T]`` each, like `linear_logprob_stats`: 0 where the label is -100, and in the first column.

    Raises:
        TypeError: the head is not a plain `nn.Linear` (it is adapted, saved apart by peft, quantised or sharded), or
            ids or labels are not integer tensors.
        ValueError: shapes disagree, labels are neither ``input_ids`` nor -100, or `linear_logprob_stats` raises it.
        RuntimeError: the model is compiled as a whole, does not call its head exactly once, changes its logits in
            other ways than those above (or by a factor that bfloat16 does not show to the last digit: pass it as
            ``temperature``), or has another number of words than its config says. The backward pass raises it in a
            block of `PerSampleGradNorms` that measures the head: leave the head out by ``parameters=``, and add
            `head_grad_norms`.

    Example:
        >>> class Tiny(nn.Module):  # stands in for transformers' AutoModelForCausalLM
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.lm_head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
        ...         nn.init.eye_(self.embed.weight), nn.init.eye_(self.lm_head.weight)
        ...     def get_output_embeddings(self):
        ...         return self.lm_head
        ...     def forward(self, input_ids, use_cache=True):
        ...         return (self.lm_head(self.embed(input_ids)),)
        >>> ids = torch.tensor([[2, 2, 3]])
        >>> model_logprob_stats(Tiny(), ids, ids).log_prob.detach()
        tensor([[ 0.0000, -0.7437, -1.7437]])
    """
    _expect_ids(input_ids, labels)
    if isinstance(temperature, Tensor) and temperature.dim() and temperature.shape != labels.shape:
        raise ValueError(f"temperature: expected a number or {list(labels.shape)}, got {list(temperature.shape)}")
    language_model = language_model_of(model)
    head, config = output_head(language_model), text_config(language_model)
    num_words, scaling = num_words_of(head, config), LogitScaling.of(config)
    options: dict[str, Any] = {
        "outputs": outputs, "slab_bytes": slab_bytes, "logits_dtype": logits_dtype, "impl": impl, **scaling._asdict()
    }  # fmt: skip
    given = {"input_ids": input_ids, "use_cache": False} | inputs
    call = RepeatableCall(model, language_model, head, given)
    replacement = _HeadReplacement(head, call, labels, temperature, num_words, scaling, options)
    with call.recording(), replaced_forward(head, replacement.forward):
        returned = model(**given)
    if replacement.statistics is None:
        raise RuntimeError(f"model: {type(language_model).__name__} returned without a call of its output head")
    logits = logits_of(returned)
    expect_changes(logits, replacement.placeholder, labels.shape, replacement.changes, scaling)
    values = iter(_StatisticsThroughOutput.apply(logits, *replacement.statistics))  # type: ignore[no-untyped-call]
    asked = [next(values) if name in outputs else None for name in LogprobStats._fields]  # in this order
    return LogprobStats(*asked)


def _expect_ids(input_ids: Tensor, labels: Tensor) -> None:
    for name, x in (("input_ids", input_ids), ("labels", labels)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected an integer tensor, got {type(x).__name__}")
        expect_integers(name, x)
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected [B, T], got {list(input_ids.shape)}")
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels: expected [B, T] like input_ids, {list(input_ids.shape)}, got {list(labels.shape)}")
    if not torch.where(labels == IGNORE_INDEX, True, labels == input_ids.to(labels.device)).all():
        raise ValueError("labels: expected input_ids, not shifted, with -100 where nothing is to be said")


def text_config(model: nn.Module) -> Any:
    """The config of the model, or of its text part where there are others; None if it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def num_words_of(head: nn.Linear, config: Any) -> int:
    """How many rows of the head are words: all, or as many as are not padding."""
    num_words = getattr(config, "unpadded_vocab_size", None) or head.out_features
    known = getattr(config, "vocab_size", None)
    if num_words > head.out_features or known not in (None, num_words, head.out_features):
        raise RuntimeError(f"model: its head has {head.out_features} words, its config {known or num_words}")
    return int(num_words)


def _rows_and_bias(head: nn.Linear, changes: LogitChanges, scaling: LogitScaling) -> tuple[int, Tensor | None]:
    """How many rows of the head to take, and a bias that masks those among them that the model masks."""
    size, possible = changes.num_words, changes.possible
    if possible is not None:
        size = int(possible.nonzero()[-1]) + 1  # padding comes last
        possible = possible[:size]
    bias = None if head.bias is None else head.bias[:size]
    if possible is None or possible.all():
        return size, bias
    if scaling.softcap is not None:
        raise RuntimeError("model: it masks words after a softcap, which linear_logprob_stats cannot")
    bias = head.weight.new_zeros(size) if bias is None else bias
    return size, bias.masked_fill(~possible.to(bias.device), -torch.inf)


def language_model_of(model: nn.Module) -> nn.Module:
    """The language model within DDP and other wrappers.

    Raises:
        RuntimeError: it is compiled as a whole.
    """
    inner = model
    while isinstance(within := getattr(inner, "module", None), nn.Module):
        inner = within
    for each in (model, inner):
        if hasattr(each, "_orig_mod") or getattr(each, "_compiled_call_impl", None) is not None:
            raise RuntimeError(
                "model: compiled as a whole, its head cannot be replaced; compile its layers, or model.model"
            )
    return inner


def output_head(model: nn.Module) -> nn.Linear:
    """The layer that returns the logits.

    Raises:
        TypeError: there is none, or it is not a plain linear layer.
    """
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if head is None:
        raise TypeError(f"model: expected a causal LM with get_output_embeddings(), got {type(model).__name__}")
    if "forward" in vars(head):
        raise TypeError(
            "model: expected an output head with its own forward, but that is replaced: by accelerate's dispatch hooks "
            "(remove_hook_from_module), or by another call of this function that still runs"
        )
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        raise TypeError(
            f"model: expected an output head that is a plain torch.nn.Linear, got {kind}; leave the head out of "
            "what is adapted, or give its merged weight to linear_logprob_stats"
        )
    return head


class _HeadReplacement:
    """Runs in place of the head's forward: it computes the statistics, and gives the model a placeholder to go on with.

    Args:
        head: the output head.
        call: the call of the model within which it runs.
        labels: ``[B, T]``, not shifted.
        temperature: a number, or ``[B, T]``.
        num_words: how many words there are by the config.
        scaling: the scaling of logits by the config.
        options: what else `linear_logprob_stats` takes.

    Attributes:
        statistics: those that were asked for, ``[B, T]`` each; None before the head was called.
        changes: what the model does to its logits.
        placeholder: the numbers that the model was given instead of logits.
    """

    def __init__(
        self,
        head: nn.Linear,
        call: RepeatableCall,
        labels: Tensor,
        temperature: float | Tensor,
        num_words: int,
        scaling: LogitScaling,
        options: Mapping[str, Any],
    ) -> None:
        self._head, self._call, self._labels, self._temperature = head, call, labels, temperature
        self._num_words, self._scaling, self._options = num_words, scaling, options
        self.statistics: list[Tensor] | None = None
        self.changes = LogitChanges(None, num_words, None, False)
        self.placeholder = labels.new_zeros(0)

    def forward(self, input: Tensor) -> Tensor:
        hidden, head, labels = input, self._head, self._labels
        if self.statistics is not None:
            raise RuntimeError(
                f"model: {type(self._call.language_model).__name__} calls its output head more than once"
            )
        if hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"model: expected its head to be given all of [B, T] = {list(labels.shape)}, got {list(hidden.shape)}; "
                "leave out logits_to_keep"
            )
        if labels.numel():
            self.changes = self._call.find_changes(hidden, self._num_words, self._scaling)
        device = hidden.device
        first = torch.zeros_like(labels[:, :1], dtype=torch.bool)
        predicted = torch.cat([first, labels[:, 1:] != IGNORE_INDEX], dim=1).to(device)
        before = predicted.roll(-1, 1)  # the positions before; the first column, which is False, comes last
        divisor = self._temperature
        if isinstance(divisor, Tensor) and divisor.dim():
            divisor = divisor.to(device)[predicted]
        if self.changes.factors is not None:
            divisor = divisor / self.changes.factors.to(device, exact_dtype(hidden))[before]
        num_rows, bias = _rows_and_bias(head, self.changes, self._scaling)
        stats = linear_logprob_stats(
            hidden[before], head.weight[:num_rows], labels.to(device)[predicted], divisor, bias, **self._options
        )
        self.statistics = [x.new_zeros(labels.shape).masked_scatter(predicted, x) for x in stats if x is not None]
        self.placeholder = placeholder_logits(hidden, head, self.changes)
        placeholder: Tensor = _PlaceholderLogits.apply(self.placeholder, *self.statistics)  # type: ignore[no-untyped-call]
        return placeholder


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within, the module has another forward. Its hooks stay: `fully_shard` gathers and frees the weights by them."""
    module.forward = forward
    try:
        with unobserved(module):
            yield
    finally:
        del module.forward


class _PlaceholderLogits(torch.autograd.Function):
    """The numbers with which the model goes on instead of logits; in its graph, the statistics come before them.

    So hooks that wrappers put on the model's output run in the backward pass, and they run before those of the head.
    """

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, *statistics: Tensor) -> Tensor:
        return placeholder.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (None,) * len(ctx.needs_input_grad)


class _StatisticsThroughOutput(torch.autograd.Function):
    """The statistics, which in the graph also come from the model's output."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *statistics: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(output)
        ctx.set_materialize_grads(False)
        return tuple(x.clone() for x in statistics)  # no views, which could not be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        [output] = ctx.saved_tensors
        return torch.zeros_like(output), *gradients  # zeros, as hooks on the output run only if it has a gradient
