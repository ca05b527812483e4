"""Tries out what a causal language model does to its logits after its head, by its own code and by hooks.

The model's forward runs again on a few numbers in place of logits. Meanwhile its layers compute nothing: they return
tensors of the shapes that they returned before. So we see for every row and every word what comes after the head.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules
from torch.utils import _pytree as pytree

PROBE_LOGITS = (-40.0, -1.0, 1.0, 40.0)  # in place of logits, to see what the model makes of them
MASKED = -1e4  # the model masks a word if the word's logit becomes this, or less
FACTOR_TOLERANCE = 2e-6  # relative error that a factor may have if it is to be divided out


class LogitScaling(NamedTuple):
    """What a model does to its logits by its config: ``softcap tanh(scale x / softcap)``, or ``scale x``."""

    softcap: float | None
    scale: float

    @staticmethod
    def of(config: Any) -> LogitScaling:
        """Read it off a config, by the names that Hugging Face's models use."""
        names = ("final_logit_softcapping", "logit_scale", "lm_head_multiplier", "logits_scaling")
        softcap, *factors = (getattr(config, name, None) for name in names)
        for name, factor in zip(names, (softcap, *factors), strict=True):
            if factor is not None and not isinstance(factor, (int, float)):
                raise RuntimeError(f"model: expected config.{name} to be a number, got {factor!r}")
        scale, multiplier, divisor = (1.0 if factor is None else float(factor) for factor in factors)
        return LogitScaling(softcap, scale * multiplier / divisor)

    def __call__(self, x: Tensor) -> Tensor:
        """Scale logits, in float64, on the host."""
        x = self.scale * x.detach().cpu().double()
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


class LogitChanges(NamedTuple):
    """What a model does to its logits besides its `LogitScaling`.

    Attributes:
        factors: ``[B, T]``, by which the model multiplies the logits of each position; None where all are 1.
        num_words: how many logits the model returns for each position.
        possible: ``[num_words]``, the words that the model does not mask; None where it masks none.
        by_number: whether it looks words up by their numbers, so that a few columns cannot stand for all.
    """

    factors: Tensor | None
    num_words: int
    possible: Tensor | None
    by_number: bool


class RepeatableCall:
    """A call of a model that can be repeated from its head on, with other logits.

    Args:
        model: the model that is called, with all that wraps it.
        language_model: the language model within.
        head: its output head.
        inputs: what the model is given, by name.
    """

    def __init__(self, model: nn.Module, language_model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any]) -> None:
        self._model, self.language_model, self._head, self._inputs = model, language_model, head, inputs
        self._path = _modules_around(head, language_model)
        self._outputs: list[tuple[nn.Module, Any]] = []  # each layer and what it returned, in the order of the calls
        self._to_repeat: list[tuple[nn.Module, Any]] = []  # those that the repeated call has not asked for yet
        self._logits: Tensor | None = None  # stand in for the head's output while the call is repeated

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within, the model's layers are called through this object."""
        places = [place for module in self._path for place in _called_children(module) if place[2] not in self._path]
        try:
            for owner, name, layer in places:
                owner._modules[name] = _LayerProxy(layer, self)  # type: ignore[assignment]
            yield
        finally:
            for owner, name, layer in places:
                owner._modules[name] = layer
            self._outputs, self._to_repeat = [], []

    def call_layer(
        self, layer: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a layer; in a repeated call, return what it returned before."""
        if self._logits is None:
            output = function(*args, **kwargs)
            if layer is not self._head:
                self._outputs.append((layer, pytree.tree_map_only(Tensor, _shape_alone, output)))
            return output
        if layer is self._head:
            return _through_hooks(layer, args, kwargs, self._logits)
        for place, (owner, output) in enumerate(self._to_repeat):
            if owner is layer:
                del self._to_repeat[place]
                return output
        return function(*args, **kwargs)  # after the head

    def repeat_with(self, logits: Tensor) -> Tensor:
        """What the model returns for these logits; what the head's hooks return, if the head is not in the model."""
        self._logits, self._to_repeat = logits.clone(), list(self._outputs)
        with torch.no_grad():
            try:
                if not self._path:
                    return logits_of((_through_hooks(self._head, (), {}, self._logits),))
                returned = self.language_model.forward(**self._inputs)
            finally:
                self._logits = None
            for module in _from_innermost(self._model, self.language_model):
                returned = _through_hooks(module, (), self._inputs, returned)
        return logits_of(returned)

    def find_changes(self, hidden: Tensor, num_words: int, scaling: LogitScaling) -> LogitChanges:
        """Try out what the model does to its logits: for all rows on a few columns, and for all words on one row.

        Args:
            hidden: ``[B, T, d]``, what the head is given.
            num_words: how many words there are by the config.
            scaling: the scaling by the config.

        Raises:
            RuntimeError: the model cannot be repeated, or does something that only the logits themselves could show.
        """
        size, rounding = hidden.shape[:2], torch.finfo(hidden.dtype).eps
        columns = hidden.new_tensor(PROBE_LOGITS)
        try:
            of_rows = self.repeat_with(columns.expand(*size, -1))
            by_number = bool((of_rows <= MASKED).any())
        except Exception:  # tried out on a row below, where the reason can be told
            by_number = True
        factors = None if by_number else _row_factors(of_rows, columns, scaling, size, rounding)

        numbers = _probe_row(self._head.out_features).to(hidden)
        masks: list[Tensor] = []
        for row in (numbers, -numbers):
            probe = row.expand(size[0] if by_number else 1, 1, -1)
            try:
                of_words = self.repeat_with(probe)
            except Exception as error:
                raise RuntimeError(
                    f"model: what it does after its head fails on logits of shape {list(probe.shape)}: {error}; "
                    "linear_logprob_stats takes its hidden states"
                ) from error
            if of_words.dim() != 3 or of_words.shape[-1] not in (num_words, len(row)):
                raise _unexpected_shape(of_words, (*size, num_words))
            num_words = of_words.shape[-1]
            low = of_words.detach().cpu() <= MASKED
            mask = low.flatten(0, -2).any(0)
            masked = bool(mask.any())
            if not torch.equal(low, mask.expand_as(low)) or any(not torch.equal(mask, other) for other in masks):
                raise RuntimeError(
                    "model: it masks other words in some rows than in others; linear_logprob_stats cannot"
                )
            masks.append(mask)
            if mask.all():
                raise RuntimeError("model: it masks all words")
            left = ~mask.to(row.device) if masked else slice(None)
            found = _row_factors(of_words[..., left], row[:num_words][left], scaling, size, rounding)
            factors = found if factors is None else factors
            of_all = factors[: found.shape[0], : found.shape[1]]
            if not torch.allclose(found, of_all, rtol=max(FACTOR_TOLERANCE, 2 * rounding), atol=0.0):
                raise RuntimeError("model: it scales some logits of a row otherwise than others")
        assert factors is not None
        scaled = None if bool((factors == 1).all()) else factors.expand(size)
        return LogitChanges(scaled, num_words, ~masks[0] if masked else None, by_number)


def placeholder_logits(hidden: Tensor, head: nn.Linear, changes: LogitChanges) -> Tensor:
    """The numbers with which the model goes on after its head: a few columns for every row, or all words of one row."""
    if changes.by_number:
        return hidden.new_ones(1, 1, head.out_features)
    return hidden.new_tensor(PROBE_LOGITS).expand(*hidden.shape[:2], len(PROBE_LOGITS))


def expect_changes(
    logits: Tensor, given: Tensor, size: torch.Size, changes: LogitChanges, scaling: LogitScaling
) -> None:
    """Raise a RuntimeError unless the real call, with its wrappers, did these changes to the placeholder logits.

    Args:
        logits: what the call returned.
        given: the placeholder logits.
        size: ``[B, T]``.
        changes: what `RepeatableCall.find_changes` found.
        scaling: the scaling by the config.
    """
    if not size.numel():
        return
    numbers, rounding = given[0, 0, : changes.num_words], torch.finfo(given.dtype).eps
    if changes.by_number and changes.possible is not None and logits.shape[-1] == changes.num_words:
        left = changes.possible.to(logits.device)
        logits, numbers = logits[..., left], numbers[changes.possible.to(numbers.device)]
    found = _row_factors(logits, numbers, scaling, size, rounding)
    known = torch.ones(1, 1, dtype=torch.float64, device="cpu") if changes.factors is None else changes.factors
    known = known[: found.shape[0], : found.shape[1]]
    if not torch.allclose(found, known.expand_as(found), rtol=max(FACTOR_TOLERANCE, 2 * rounding), atol=0.0):
        raise _unexpected_logits(logits, numbers, scaling)


def logits_of(returned: Any) -> Tensor:
    """The logits among what a model returns."""
    logits: Tensor = returned.logits if hasattr(returned, "logits") else returned[0]
    return logits


@cache
def _probe_row(many: int) -> Tensor:
    """Numbers in place of the logits of a row: their sizes are between 1 and 3, and they are of either sign."""
    wave = torch.arange(many, dtype=torch.float64, device="cpu").cos()
    return (wave.sign() + 2 * wave).float()


def _row_factors(got: Tensor, numbers: Tensor, scaling: LogitScaling, size: torch.Size, rounding: float) -> Tensor:
    """By what the model multiplied each row, ``[B or 1, T or 1]``: 1 where that is within the model's rounding.

    Raises:
        RuntimeError: the model did something else.
    """
    fits = got.dim() == 3 and got.shape[0] in (1, size[0]) and got.shape[1] in (1, size[1])
    if not fits or got.shape[-1] != len(numbers):
        raise _unexpected_shape(got, (*size, len(numbers)))
    ratios = got.detach().cpu().double() / scaling(numbers)
    factors = ratios.mean(-1)
    as_expected = ((ratios - 1).abs() <= max(1e-6, 2 * rounding)).all(-1)
    alike = ((ratios / factors[..., None] - 1).abs() <= FACTOR_TOLERANCE).all(-1) & (factors > 0) & factors.isfinite()
    if not (as_expected | alike).all():
        row = tuple((~(as_expected | alike)).nonzero()[0].tolist())
        raise _unexpected_logits(got[row], numbers, scaling)
    return torch.where(as_expected, 1.0, factors)


def _unexpected_logits(got: Tensor, numbers: Tensor, scaling: LogitScaling) -> RuntimeError:
    given, wanted, found = (
        [round(x, 4) for x in values.flatten()[:4].tolist()] for values in (numbers.double(), scaling(numbers), got)
    )
    return RuntimeError(
        f"model: expected {wanted} for logits of {given} (softcap {scaling.softcap}, scale {scaling.scale:g}, by its "
        f"config), got {found}: it does something else to its logits; linear_logprob_stats takes softcap= and scale=, "
        "and any temperature="
    )


def _unexpected_shape(got: Tensor, expected: tuple[int, ...]) -> RuntimeError:
    return RuntimeError(f"model: expected it to return what its head does, {list(expected)}, got {list(got.shape)}")


# ------------------------------------------------------------------------------------------------ modules and hooks
class _LayerProxy:
    """Stands in the place of a layer: calls go through the `RepeatableCall`, all else goes to the layer."""

    _proxied: tuple[Any, RepeatableCall]  # a layer of any class, which may be indexed

    def __init__(self, layer: nn.Module, call: RepeatableCall) -> None:
        object.__setattr__(self, "_proxied", (layer, call))

    __class__ = property(lambda self: type(self._proxied[0]))  # for isinstance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer, call = self._proxied
        return call.call_layer(layer, layer, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer, call = self._proxied
        return call.call_layer(layer, layer.forward, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._proxied[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._proxied[0], name, value)

    def __getitem__(self, index: Any) -> Any:
        return self._proxied[0][index]

    def __len__(self) -> int:
        return len(self._proxied[0])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._proxied[0])

    def __bool__(self) -> bool:
        return True


def _modules_around(wanted: nn.Module, model: nn.Module) -> list[nn.Module]:
    """The modules that contain a module, from the outermost; none if the model does not hold it.

    The search is breadth first, as a head is near the top.
    """
    waiting = deque([[model]])
    seen = {model}
    while waiting:
        path = waiting.popleft()
        for child in path[-1]._modules.values():
            if child is wanted:
                return path
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append([*path, child])
    return []


def _called_children(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The children that a module calls, with their places; in place of a mere container, what that contains."""
    for name, child in module._modules.items():
        if child is None:
            continue
        if type(child).forward is nn.Module.forward and "forward" not in vars(child):
            yield from _called_children(child)
        else:
            yield module, name, child


def _from_innermost(model: nn.Module, language_model: nn.Module) -> list[nn.Module]:
    """The language model and what wraps it, from the innermost."""
    wrappers = [model]
    while wrappers[0] is not language_model:
        wrappers.insert(0, wrappers[0].module)  # type: ignore[arg-type]
    return wrappers


def _through_hooks(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """What a module's forward hooks make of its output; those that gather shards, and change no numbers, do not run."""
    with_keywords = {**_modules._global_forward_hooks_with_kwargs, **module._forward_hooks_with_kwargs}
    for number, hook in (*_modules._global_forward_hooks.items(), *module._forward_hooks.items()):
        if (getattr(hook, "__module__", None) or "").startswith("torch.distributed"):
            continue
        changed = hook(module, args, kwargs, output) if number in with_keywords else hook(module, args, output)
        output = output if changed is None else changed
    return output


def _shape_alone(x: Tensor) -> Tensor:
    """Zeros of the same shape that take no memory, as what comes after the head looks at logits alone."""
    return x.new_zeros(()).expand(x.shape) if x.is_floating_point() else x
