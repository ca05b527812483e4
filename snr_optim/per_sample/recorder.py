"""The hooks: every call of a layer keeps its input, and its backward pass turns that into norms per sequence."""

from __future__ import annotations

import weakref
import math
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from snr_optim.backward import current_backward, is_nested_backward
from snr_optim.per_sample.capture import Counter, Observation
from snr_optim.per_sample.check import GradientCheck
from snr_optim.per_sample.graph import mark_as_deepest, run_without_weight_gradients
from snr_optim.per_sample.layout import Layout
from snr_optim.per_sample.rules import Call, Rule, Uses, rule_of
from snr_optim.per_sample.totals import ExactTotals, SketchTotals, Totals, next_size

FIRST_SKETCH = 16  # columns, before any error is known


class PerSampleGradNorms:
    def __init__(
        self,
        model: nn.Module,
        method: Literal["exact", "sketch"] = "exact",
        *,
        parameters: Callable[[str], bool] | None = None,
        rules: Mapping[type[nn.Module], Rule] | None = None,
        relative_error: float = 0.1,
        seed: int = 0,
        check: bool = True,
    ) -> None:
        if method not in ("exact", "sketch"):
            raise ValueError(f"method: expected 'exact' or 'sketch', got {method!r}")
        if not 0 < relative_error < 1:
            raise ValueError(f"relative_error: expected a number between 0 and 1, got {relative_error!r}")
        self.method, self.relative_error, self.seed = method, relative_error, seed
        self.sketch_size = FIRST_SKETCH
        self._model = weakref.ref(model)
        self._wanted = parameters or (lambda name: True)
        self._layers = _layers_of(model, self._wanted, rules or {})
        self._covered = {name for layer in self._layers for name in layer.names.values()}
        self._device = _device_of(model, self._covered)
        _refuse_compiled(model)
        self._check: GradientCheck | None = GradientCheck() if check else None
        self._block: _Block | None = None
        self._blocks = 0
        self._result: tuple[Tensor, Tensor | None] | None = None
        me = weakref.ref(self)
        handles = [
            layer.module.register_forward_hook(partial(_on_forward, me, layer), with_kwargs=True)
            for layer in self._layers
        ]
        for name, p in model.named_parameters():
            if name in self._covered and not hasattr(p, "placements"):
                handles.append(p.register_hook(partial(_on_parameter, me, name)))
        self._remove = weakref.finalize(self, _remove_all, handles)

    # -- what the user calls ------------------------------------------------------------------------

    @contextmanager
    def sequences(
        self,
        batch_size: int | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        groups: int | Tensor | None = None,
    ) -> Iterator[None]:
        if (batch_size is None) == (cu_seqlens is None):
            raise ValueError("batch_size, cu_seqlens: expected one of them: batch_size for padded, cu_seqlens for packed")
        if self._block is not None:
            raise RuntimeError("sequences: the previous block is still open")
        if not self._remove.alive:
            raise RuntimeError("sequences: the hooks were removed")
        self._result = None
        self._expect_known_parameters()
        if cu_seqlens is not None:
            layout = Layout.of_packed(cu_seqlens, groups, self._device)
        else:
            layout = Layout.padded(batch_size, groups, self._device)  # type: ignore[arg-type]
        totals: Totals
        if self.method == "exact":
            totals = ExactTotals(len(layout), self._device)
        else:
            totals = SketchTotals(len(layout), self._device, self.sketch_size, (self.seed, self._blocks))
        self._block = _Block(layout, totals)
        try:
            yield
            block = self._block
            if block.backward is None:
                raise RuntimeError("sequences: no backward pass through the model within the block")
            if self._check is not None and self._check.finish():
                self._check = None
            self._result = block.totals.finish()
        finally:
            self._block = None
            if self._check is not None:
                self._check.clear()
        self._blocks += 1
        if self._result[1] is not None:
            self.sketch_size = next_size(self.sketch_size, *self._result, self.relative_error)

    def backward(self, log_prob_sum: Tensor, *, retain_graph: bool = False) -> None:
        if self._block is None:
            raise RuntimeError("backward: expected within `with norms.sequences(...)`")
        run_without_weight_gradients(log_prob_sum, retain_graph)

    def squared(self, scale: float | Tensor = 1.0) -> Tensor:
        norms, _ = self._finished()
        return norms / _square(scale, norms)

    def standard_error(self, scale: float | Tensor = 1.0) -> Tensor:
        norms, variances = self._finished()
        if variances is None:
            return torch.zeros_like(norms)
        return variances.sqrt() / _square(scale, norms)

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._remove()

    def _finished(self) -> tuple[Tensor, Tensor | None]:
        if self._result is None:
            raise RuntimeError("squared: no block of `with norms.sequences(...)` has been completed")
        return self._result

    def _expect_known_parameters(self) -> None:
        model = self._model()
        if model is None:
            raise RuntimeError("sequences: the model is gone")
        now = {name for name, p in model.named_parameters() if p.requires_grad and self._wanted(name)}
        if new := sorted(now - self._covered):
            raise RuntimeError(
                f"model: {_some(new)} became trainable after PerSampleGradNorms was made; make it anew, "
                "when the model is wrapped and frozen as it will be trained"
            )

    # -- what the hooks call ------------------------------------------------------------------------

    def _on_gradient(self, layer: _Layer, trained: list[str], observed: Observation, gradient: Tensor) -> None:
        """The gradient of a layer's output has come."""
        block = self._block
        if block is None:
            return
        block.enter(current_backward())
        inputs = observed.inputs()
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            call = Call(layer.module, gradient if inputs is None else inputs, gradient, block.layout, trained)
            try:
                uses = layer.rule(call)
            except ValueError as error:
                raise ValueError(f"{error} (in {layer.name!r})") from None
            named = {layer.names[local]: use for local, use in uses.items()}
            if self._check is not None:
                self._check.expect(named)
            block.report(layer, uses, once=not observed.others_wait())
            block.lowest = min(block.lowest, gradient.dtype, key=lambda dtype: dtype.itemsize)

    def _on_parameter(self, name: str, gradient: Tensor) -> None:
        """The gradient of a parameter is about to be accumulated."""
        block = self._block
        if block is None:
            return
        if name not in block.used:
            raise RuntimeError(
                f"{name!r} got a gradient, but the layer that owns it was not called: its weight is used elsewhere, "
                "by a fused loss perhaps, where no hook sees it"
            )
        if self._check is not None:
            self._check.compare(name, gradient, block.lowest)


class _Block:
    """What one ``with norms.sequences(...)`` has seen so far."""

    def __init__(self, layout: Layout, totals: Totals) -> None:
        self.layout, self.totals = layout, totals
        self.backward: int | None = None  # the pass that is no checkpoint's
        self.used: set[str] = set()  # parameters, by name
        self.lowest = torch.float64  # precision among the gradients
        self._passes: set[int] = set()
        self._counted: set[_Layer] = set()  # layers whose norms are in the totals
        self._kept: set[_Layer] = set()

    def enter(self, number: int) -> None:
        """A gradient came in this run of autograd.

        Raises:
            RuntimeError: it is another one than before.
        """
        if number in self._passes:
            return
        self._passes.add(number)
        if is_nested_backward():
            return
        if self.backward is not None:
            raise RuntimeError("sequences: a second backward pass within one block; take a block for each")
        self.backward = number

    def report(self, layer: _Layer, uses: Uses, once: bool) -> None:
        """Count the uses, or keep those whose parameters have others."""
        if layer in self._counted:
            raise RuntimeError(
                f"{layer.name!r} is called several times under a reentrant checkpoint, which does not tell before it "
                "is too late; use_reentrant=False"
            )
        once = once and layer not in self._kept
        kept = {local for local in uses if not once or layer.names[local] in layer.shared}
        self.totals.add(layer.names, {local: use for local, use in uses.items() if local not in kept})
        for local in kept:
            self.totals.keep(layer.names[local], uses[local])
        (self._counted if once else self._kept).add(layer)
        self.used.update(layer.names[local] for local in uses)


@dataclass(eq=False)
class _Layer:
    """A module with parameters of its own that are covered."""

    name: str
    module: nn.Module
    rule: Rule
    names: dict[str, str]  # of its parameters: within the module, and within the model
    shared: set[str]  # those, by their names within the model, that other modules own too
    calls: Counter = field(default_factory=Counter)


def _on_forward(
    recorder: weakref.ref[PerSampleGradNorms], layer: _Layer, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    """A layer was called: hook its output, if a gradient may come."""
    if not torch.is_grad_enabled() or not isinstance(output, Tensor) or not output.requires_grad:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(output):
        return  # torch.func differentiates by its own ways
    trained = [local for local, p in module._parameters.items() if local in layer.names and p is not None and p.requires_grad]
    given: Tensor = args[0] if args else next(iter(kwargs.values()))
    if not given.requires_grad:
        mark_as_deepest(output)
    if not trained:
        return

    def on_gradient(observed: Observation, gradient: Tensor) -> None:
        me = recorder()
        if me is not None:
            me._on_gradient(layer, trained, observed, gradient)

    output.register_hook(Observation(layer.calls, given, on_gradient))


def _on_parameter(recorder: weakref.ref[PerSampleGradNorms], name: str, gradient: Tensor) -> None:
    me = recorder()
    if me is not None:
        me._on_parameter(name, gradient)


def _remove_all(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


# ------------------------------------------------------------------------------------------------- looking at the model
def _layers_of(
    model: nn.Module, wanted: Callable[[str], bool], rules: Mapping[type[nn.Module], Rule]
) -> list[_Layer]:
    names: dict[int, str] = {}  # a parameter's first name
    owners: Counts[str] = Counts()
    for name, module in model.named_modules():
        for local, p in module._parameters.items():
            if p is not None and p.requires_grad:
                full = names.setdefault(id(p), f"{name}.{local}" if name else local)
                owners[full] += 1
    layers, missing = [], []
    for name, module in model.named_modules():
        own = {
            local: names[id(p)] for local, p in module._parameters.items() if p is not None and id(p) in names
        }
        own = {local: full for local, full in own.items() if wanted(full)}
        if not own:
            continue
        rule = rule_of(module, rules)
        if rule is None:
            missing += [f"{full!r} ({type(module).__name__})" for full in own.values()]
        else:
            layers.append(_Layer(name, module, rule, own, {full for full in own.values() if owners[full] > 1}))
    if missing:
        raise ValueError(
            f"model: no rule for {_some(missing)}. Freeze them, leave them out on purpose by parameters=, or give a rule "
            "by rules={the layer's class: by_autograd}"
        )
    if not layers:
        raise ValueError("model: expected at least one parameter with requires_grad")
    return layers


def _device_of(model: nn.Module, names: set[str]) -> torch.device:
    devices = {p.device for name, p in model.named_parameters() if name in names}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model: expected all parameters on one device, got {found}")
    return devices.pop()


def _refuse_compiled(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"model: {name or 'it'} is compiled by torch.compile, which hooks cannot look into")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _square(scale: float | Tensor, norms: Tensor) -> Tensor:
    """``scale^2``; NaN where it is zero, for then the backward pass knew nothing of the sequence."""
    square = torch.as_tensor(scale, dtype=norms.dtype, device=norms.device).square()
    if square.dim() and square.shape != norms.shape:
        raise ValueError(f"scale: expected a number or one per sequence, {list(norms.shape)}, got {list(square.shape)}")
    return square.masked_fill(square == 0, math.nan)
