"""What a causal language model does to its logits after its head, by its own code and by hooks: tried out, not guessed.

The model's forward runs again on a few numbers in place of logits, while its layers only give back tensors of the
shapes that they gave before: nothing is computed, and what comes after the head is seen for every row and every word.
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

PROBES = (-40.0, -1.0, 1.0, 40.0)  # in place of logits, to see what the model makes of them
LOWEST = -1e4  # a word whose logit becomes this, or less, cannot be
KNOWN_TO = 2e-6  # relative error of a factor that may be divided out


class Scaling(NamedTuple):
    """What a model makes of its logits, by its config: ``softcap tanh(scale x / softcap)``, or ``scale x``."""

    softcap: float | None
    scale: float

    @staticmethod
    def of(config: Any) -> Scaling:
        """By the names that Hugging Face's models have for it in their configurations."""
        names = ("final_logit_softcapping", "logit_scale", "lm_head_multiplier", "logits_scaling")
        softcap, *factors = (getattr(config, name, None) for name in names)
        for name, factor in zip(names, (softcap, *factors), strict=True):
            if factor is not None and not isinstance(factor, (int, float)):
                raise RuntimeError(f"model: expected config.{name} to be a number, got {factor!r}")
        scale, multiplier, divisor = (1.0 if factor is None else float(factor) for factor in factors)
        return Scaling(softcap, scale * multiplier / divisor)

    def __call__(self, x: Tensor) -> Tensor:
        """In float64, on the host."""
        x = self.scale * x.detach().cpu().double()
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


class AfterHead(NamedTuple):
    """What a model does to its logits besides its `Scaling`.

    Attributes:
        factors: ``[B, T]``, what the logits of each position are multiplied by; None where all are 1.
        words: how many logits the model returns.
        possible: ``[words]``, those that it does not mask; None where it masks none.
        by_number: whether it looks words up by their numbers, so that a few columns cannot stand for all.
    """

    factors: Tensor | None
    words: int
    possible: Tensor | None
    by_number: bool


class Trial:
    """A call of a model, to be repeated from its head on.

    Args:
        model: what is called, with all that wraps it.
        language_model: the model within.
        head: its output head.
        inputs: what the model is given, by name.
    """

    def __init__(self, model: nn.Module, language_model: nn.Module, head: nn.Linear, inputs: Mapping[str, Any]) -> None:
        self._model, self._language_model, self._head, self._inputs = model, language_model, head, inputs
        self._path = _path_to(head, language_model)
        self._outputs: list[tuple[nn.Module, Any]] = []  # of layers, in the order of their calls
        self._left: list[tuple[nn.Module, Any]] = []
        self._probe: Tensor | None = None  # in place of logits, while the call is repeated

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The model's layers are called through this object."""
        places = [place for module in self._path for place in _layers_of(module) if place[2] not in self._path]
        try:
            for owner, name, layer in places:
                owner._modules[name] = _Stand(layer, self)  # type: ignore[assignment]
            yield
        finally:
            for owner, name, layer in places:
                owner._modules[name] = layer
            self._outputs, self._left = [], []

    def call(self, layer: nn.Module, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a layer: a real one is done, and what a repeated one gave before is given back."""
        if self._probe is None:
            output = function(*args, **kwargs)
            if layer is not self._head:
                self._outputs.append((layer, pytree.tree_map_only(Tensor, _without_numbers, output)))
            return output
        if layer is self._head:
            return _hooked(layer, args, kwargs, self._probe)
        for place, (owner, output) in enumerate(self._left):
            if owner is layer:
                del self._left[place]
                return output
        return function(*args, **kwargs)  # after the head

    def again(self, probe: Tensor) -> Tensor:
        """What the model makes of these numbers in place of its logits; its hooks alone, if its head is not in it."""
        self._probe, self._left = probe.clone(), list(self._outputs)
        with torch.no_grad():
            try:
                if not self._path:
                    return logits_of((_hooked(self._head, (), {}, self._probe),))
                returned = self._language_model.forward(**self._inputs)
            finally:
                self._probe = None
            for module in _outwards(self._model, self._language_model):
                returned = _hooked(module, (), self._inputs, returned)
        return logits_of(returned)

    def outcome(self, hidden: Tensor, words: int, scaling: Scaling) -> AfterHead:
        """Try it out: for all rows on a few columns, and for all words on a row.

        Args:
            hidden: ``[B, T, d]``, what the head is given.
            words: how many there are, by the config.
            scaling: by the config.

        Raises:
            RuntimeError: it cannot be tried out, or is something that only the logits themselves could show.
        """
        size, rounding = hidden.shape[:2], torch.finfo(hidden.dtype).eps
        columns = hidden.new_tensor(PROBES)
        try:
            of_rows = self.again(columns.expand(*size, -1))
            by_number = bool((of_rows <= LOWEST).any())
        except Exception:  # tried out on a row below, where the reason can be told
            by_number = True
        factors = None if by_number else _factors(of_rows, columns, scaling, size, rounding)

        numbers = _numbers(self._head.out_features).to(hidden)
        masks: list[Tensor] = []
        for row in (numbers, -numbers):
            probe = row.expand(size[0] if by_number else 1, 1, -1)
            try:
                of_words = self.again(probe)
            except Exception as error:
                raise RuntimeError(
                    f"model: what it does after its head fails on logits of shape {list(probe.shape)}: {error}; "
                    "linear_logprob_stats takes its hidden states"
                ) from error
            if of_words.dim() != 3 or of_words.shape[-1] not in (words, len(row)):
                raise _unexpected_shape(of_words, (*size, words))
            words = of_words.shape[-1]
            low = of_words.detach().cpu() <= LOWEST
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
            found = _factors(of_words[..., left], row[:words][left], scaling, size, rounding)
            factors = found if factors is None else factors
            of_all = factors[: found.shape[0], : found.shape[1]]
            if not torch.allclose(found, of_all, rtol=max(KNOWN_TO, 2 * rounding), atol=0.0):
                raise RuntimeError("model: it scales some logits of a row otherwise than others")
        assert factors is not None
        scaled = None if bool((factors == 1).all()) else factors.expand(size)
        return AfterHead(scaled, words, ~masks[0] if masked else None, by_number)


def stand_in(hidden: Tensor, head: nn.Linear, after: AfterHead) -> Tensor:
    """What the model goes on with instead of logits: a few columns for every row, or all words of one row."""
    if after.by_number:
        return hidden.new_ones(1, 1, head.out_features)
    return hidden.new_tensor(PROBES).expand(*hidden.shape[:2], len(PROBES))


def expect_outcome(logits: Tensor, given: Tensor, size: torch.Size, after: AfterHead, scaling: Scaling) -> None:
    """Raise a RuntimeError unless the real call made of `stand_in` what the trial said, wrappers and all."""
    if not size.numel():
        return
    numbers, rounding = given[0, 0, : after.words], torch.finfo(given.dtype).eps
    if after.by_number and after.possible is not None and logits.shape[-1] == after.words:
        left = after.possible.to(logits.device)
        logits, numbers = logits[..., left], numbers[after.possible.to(numbers.device)]
    found = _factors(logits, numbers, scaling, size, rounding)
    known = torch.ones(1, 1, dtype=torch.float64, device="cpu") if after.factors is None else after.factors
    known = known[: found.shape[0], : found.shape[1]]
    if not torch.allclose(found, known.expand_as(found), rtol=max(KNOWN_TO, 2 * rounding), atol=0.0):
        raise _unlike(logits, numbers, scaling)


def logits_of(returned: Any) -> Tensor:
    """The logits among what a model returns."""
    logits: Tensor = returned.logits if hasattr(returned, "logits") else returned[0]
    return logits


@cache
def _numbers(many: int) -> Tensor:
    """In place of the logits of a row: between 1 and 3, of either sign."""
    wave = torch.arange(many, dtype=torch.float64, device="cpu").cos()
    return (wave.sign() + 2 * wave).float()


def _factors(got: Tensor, numbers: Tensor, scaling: Scaling, size: torch.Size, rounding: float) -> Tensor:
    """``[B or 1, T or 1]``: what each row was multiplied by; 1 where that is within the rounding of the model.

    Raises:
        RuntimeError: something else was done.
    """
    fits = got.dim() == 3 and got.shape[0] in (1, size[0]) and got.shape[1] in (1, size[1])
    if not fits or got.shape[-1] != len(numbers):
        raise _unexpected_shape(got, (*size, len(numbers)))
    ratios = got.detach().cpu().double() / scaling(numbers)
    factors = ratios.mean(-1)
    as_expected = ((ratios - 1).abs() <= max(1e-6, 2 * rounding)).all(-1)
    alike = ((ratios / factors[..., None] - 1).abs() <= KNOWN_TO).all(-1) & (factors > 0) & factors.isfinite()
    if not (as_expected | alike).all():
        row = tuple((~(as_expected | alike)).nonzero()[0].tolist())
        raise _unlike(got[row], numbers, scaling)
    return torch.where(as_expected, 1.0, factors)


def _unlike(got: Tensor, numbers: Tensor, scaling: Scaling) -> RuntimeError:
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
class _Stand:
    """In the place of a layer: calls go through the `Trial`, all else to the layer."""

    def __init__(self, layer: nn.Module, trial: Trial) -> None:
        object.__setattr__(self, "_stands_for", (layer, trial))

    __class__ = property(lambda self: type(self._stands_for[0]))  # for isinstance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer, trial = self._stands_for
        return trial.call(layer, layer, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer, trial = self._stands_for
        return trial.call(layer, layer.forward, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stands_for[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._stands_for[0], name, value)

    def __getitem__(self, index: Any) -> Any:
        return self._stands_for[0][index]

    def __len__(self) -> int:
        return len(self._stands_for[0])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stands_for[0])

    def __bool__(self) -> bool:
        return True


def _path_to(wanted: nn.Module, model: nn.Module) -> list[nn.Module]:
    """The modules that contain it, from the outermost; none if it is not in the model. Breadth first: it is near."""
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


def _layers_of(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """What is called of a module's children, with its place: of mere containers, what they contain."""
    for name, child in module._modules.items():
        if child is None:
            continue
        if type(child).forward is nn.Module.forward and "forward" not in vars(child):
            yield from _layers_of(child)
        else:
            yield module, name, child


def _outwards(model: nn.Module, language_model: nn.Module) -> list[nn.Module]:
    """The language model and what wraps it, from within."""
    wrappers = [model]
    while wrappers[0] is not language_model:
        wrappers.insert(0, wrappers[0].module)  # type: ignore[arg-type]
    return wrappers


def _hooked(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """What a module's forward hooks make of its output: those that may change numbers, not those that gather shards."""
    with_keywords = {**_modules._global_forward_hooks_with_kwargs, **module._forward_hooks_with_kwargs}
    for number, hook in (*_modules._global_forward_hooks.items(), *module._forward_hooks.items()):
        if (getattr(hook, "__module__", None) or "").startswith("torch.distributed"):
            continue
        changed = hook(module, args, kwargs, output) if number in with_keywords else hook(module, args, output)
        output = output if changed is None else changed
    return output


def _without_numbers(x: Tensor) -> Tensor:
    """A tensor like it, of zeros that take no memory: what comes after the head looks at logits alone."""
    return x.new_zeros(()).expand(x.shape) if x.is_floating_point() else x
