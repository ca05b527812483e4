"""Every optimizer of torch, in every implementation: an attached scheduler does what the lr by hand does."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from snr_optim import SNRAdaptiveLR

SMOOTHING, MIN_FACTOR = 0.5, 0.05
STEPS, COPIED_AFTER, MICRO_BATCHES = 5, 2, 3
CEILINGS = (0.02, 0.05)  # of the two parameter groups


@dataclass(frozen=True)
class Row:
    """An optimizer with settings that bring out more of its code."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "dense"

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{name}={value}" for name, value in self.options.items())])


TABLE = [
    Row("SGD"),
    Row("SGD", {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    Row("SGD", {"momentum": 0.9, "nesterov": True, "maximize": True}),
    Row("Adam", {"weight_decay": 0.01}),
    Row("Adam", {"amsgrad": True, "maximize": True}),
    Row("AdamW"),
    Row("AdamW", {"amsgrad": True, "betas": (0.8, 0.9)}),
    Row("NAdam"),
    Row("NAdam", {"decoupled_weight_decay": True, "weight_decay": 0.01}),
    Row("RAdam", {"betas": (0.9, 0.6)}),  # so that it is rectified within five steps
    Row("Adamax"),
    Row("Adagrad", {"lr_decay": 0.1}),
    Row("Adadelta"),
    Row("RMSprop", {"centered": True, "momentum": 0.5}),
    Row("Rprop"),
    Row("ASGD", {"t0": 2}),  # so that it averages
    Row("SparseAdam", model="sparse"),
    Row("Adafactor"),
    Row("Muon", model="matrices"),
]
REFUSED = ["LBFGS"]  # several gradients per step

IMPLEMENTATIONS = ["plain", "foreach", "fused", "capturable"]
COPIES = ["as it is", "saved", "deepcopy", "pickle"]


def optimizer_class(row: Row) -> type[torch.optim.Optimizer]:
    return getattr(torch.optim, row.name)


def settings_of(row: Row) -> set[str]:
    return set(inspect.signature(optimizer_class(row)).parameters)


ROWS = [row for row in TABLE if hasattr(torch.optim, row.name)]  # Muon is new
CELLS = [(row, how) for row in ROWS for how in IMPLEMENTATIONS if how in {"plain", *settings_of(row)}]


pytestmark = pytest.mark.usefixtures("one_thread")


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Embedding(6, 3, sparse=True) for _ in range(2))

    def forward(self, x):
        tokens = (x[:, 0].abs() * 10).long() % 6
        return self.first(tokens).tanh() + self.second((tokens + 1) % 6)


def build_model(kind: str) -> nn.Module:
    bias = kind != "matrices"
    model = nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3, bias=bias))
    model = Sparse() if kind == "sparse" else model
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator))
    return model.double()


def loss_of(model: nn.Module, step: int, k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + k)
    x, y = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator).to(next(model.parameters()).device)
    return (model(x + 1) - y - 1).square().mean() / MICRO_BATCHES


def build(row: Row, implementation: str, tensor_lr: bool, device: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = build_model(row.model).to(device)
    layers = [layer for layer in model.children() if list(layer.parameters())]
    groups = [
        {
            "params": list(layer.parameters()),
            "lr": torch.tensor(lr, device=device, dtype=torch.float64) if tensor_lr else lr,
        }
        for layer, lr in zip(layers, CEILINGS, strict=True)
    ]
    options = dict(row.options) | ({"foreach": False} if "foreach" in settings_of(row) else {})
    if implementation == "foreach":
        options["foreach"] = True
    elif implementation != "plain":
        options[implementation] = True
        options.pop("foreach", None)
    return model, optimizer_class(row)(groups, **options)


def copied(how: str, of_all: tuple[Any, ...], fresh: Any) -> tuple[Any, ...]:
    """The same objects, or copies of them."""
    if how == "deepcopy":
        return copy.deepcopy(of_all)
    if how == "pickle":
        return pickle.loads(pickle.dumps(of_all))
    if how == "saved":
        file = io.BytesIO()
        torch.save([one.state_dict() for one in of_all], file)
        file.seek(0)
        of_all = fresh()
        for one, state in zip(of_all, torch.load(file, weights_only=True), strict=True):
            one.load_state_dict(state)
    return of_all


class Factor:
    """``S / (S + V)`` of averages, from explicit gradients, by the formulas."""

    def __init__(self) -> None:
        self.signal = self.sq_norm = 0.0
        self.now = 1.0

    def see(self, gradients: list[list[torch.Tensor]]) -> None:
        """Take the gradients of the micro-batches, as they are added to ``.grad``."""
        m = len(gradients)
        flat = torch.stack([torch.cat([g.to_dense().flatten() for g in one]) for one in gradients]) * m
        sq_norm = flat.mean(0).square().sum().item()
        noise = (flat.square().sum(1).mean().item() - sq_norm) / (m - 1)
        self.signal = SMOOTHING * self.signal + (1 - SMOOTHING) * (sq_norm - noise)
        self.sq_norm = SMOOTHING * self.sq_norm + (1 - SMOOTHING) * sq_norm
        self.now = min(1.0, max(MIN_FACTOR, self.signal / self.sq_norm))


def step_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, factor: Factor) -> None:
    """Explicit gradients, their factor, the lr of every group, and torch's own step."""
    parameters = list(model.parameters())
    gradients = [list(torch.autograd.grad(loss_of(model, step, k), parameters)) for k in range(MICRO_BATCHES)]
    factor.see(gradients)
    for p, of_batches in zip(parameters, zip(*gradients, strict=True), strict=True):
        p.grad = of_batches[0] + of_batches[1] + of_batches[2]
    for group, ceiling in zip(optimizer.param_groups, CEILINGS, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(ceiling * factor.now)
        else:
            group["lr"] = ceiling * factor.now
    optimizer.step()
    optimizer.zero_grad()


def refusal(row: Row, implementation: str, tensor_lr: bool, device: str) -> str | None:
    """Why torch does not do it, without us."""
    try:
        model, optimizer = build(row, implementation, tensor_lr, device)
        for k in range(2):
            loss_of(model, 0, k).backward()
            optimizer.step()
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        return f"torch: {error}"
    return None


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize(("row", "implementation"), CELLS, ids=str)
def test_the_attached_scheduler_is_the_lr_by_hand(row, implementation, tensor_lr):
    device = "cuda" if implementation == "capturable" and torch.cuda.is_available() else "cpu"
    why = refusal(row, implementation, tensor_lr, device)
    if why is not None:
        pytest.skip(why)
    for how in COPIES:
        weights_are_those_by_hand(how, row, partial(build, row, implementation, tensor_lr, device))


def weights_are_those_by_hand(how: str, row: Row, fresh: Any) -> None:
    def scheduled() -> tuple[Any, ...]:
        model, optimizer = fresh()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"optimizer: the steps of Rprop")  # which is true, and tested
            return model, optimizer, SNRAdaptiveLR(optimizer, smoothing=SMOOTHING, min_factor=MIN_FACTOR)

    by_hand, ours, factor = fresh(), scheduled(), Factor()
    ours[2].attach(ours[0])
    factors = []
    for step in range(STEPS):
        if step == COPIED_AFTER:
            by_hand, ours = copied(how, by_hand, fresh), copied(how, ours, scheduled)
            if how != "as it is":
                ours[2].attach(ours[0])
        step_by_hand(*by_hand, step, factor)
        model, optimizer, scheduler = ours
        for k in range(MICRO_BATCHES):
            loss_of(model, step, k).backward()
        optimizer.step()
        used = [float(group["lr"]) for group in optimizer.param_groups]
        scheduler.step()
        optimizer.zero_grad()
        factors.append(factor.now)
        where = f"{how}, step {step}"
        assert scheduler.factor == pytest.approx(factor.now, rel=1e-10), where
        assert used == pytest.approx([ceiling * factor.now for ceiling in CEILINGS], rel=1e-10), where
        for p, q in zip(model.parameters(), by_hand[0].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=lambda text, where=where: f"{where}: {text}")
    # Neither constant, nor all at the floor or the ceiling.
    assert len({factor for factor in factors if MIN_FACTOR < factor < 1}) > 2, factors
    start = build_model(row.model)
    assert all(not torch.equal(p.cpu(), q) for p, q in zip(model.parameters(), start.parameters(), strict=True))


def test_the_table_names_every_optimizer_of_torch():
    public = {name for name, value in vars(torch.optim).items() if inspect.isclass(value)}
    optimizers = {name for name in public if issubclass(getattr(torch.optim, name), torch.optim.Optimizer)}
    assert optimizers - {"Optimizer"} <= {row.name for row in TABLE} | set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_takes_several_gradients_per_step_is_refused(name):
    model = build_model("dense")
    with pytest.raises(TypeError, match=name):
        SNRAdaptiveLR(getattr(torch.optim, name)(model.parameters())).attach(model)


def test_rprop_is_told_apart_from_those_that_heed_the_lr():
    parameters = [nn.Parameter(torch.ones(2, 2))]
    for row in ROWS:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            SNRAdaptiveLR(optimizer_class(row)(parameters, lr=0.1))
        assert any("do not depend on the lr" in str(one.message) for one in said) == (row.name == "Rprop")


def test_a_wrong_lr_by_hand_is_found(monkeypatch):
    """The table can fail: at another smoothing, and at m in place of m - 1."""
    fresh = partial(build, Row("AdamW"), "plain", False, "cpu")
    monkeypatch.setattr(f"{__name__}.MIN_FACTOR", 0.0)
    see = Factor.see

    def wrong(self, gradients):
        see(self, gradients)
        self.now = math.sqrt(self.now)

    weights_are_those_by_hand("as it is", Row("AdamW"), fresh)
    monkeypatch.setattr(Factor, "see", wrong)
    with pytest.raises(AssertionError):
        weights_are_those_by_hand("as it is", Row("AdamW"), fresh)
