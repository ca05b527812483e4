"""What each rank of the tests of verl's engine runs: its own engine on CPU, against gradients one by one."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import pytest
import torch
import torch.distributed as dist
from ranks import leave_together
from torch.distributed.fsdp import fully_shard
from trainers import tiny_qwen3
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import DatasetPadMode
from verl.utils.device import get_platform
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from snr_optim import GradientMoments
from snr_optim.integrations.verl.replacing import problems

platform = type(get_platform())  # verl knows no CPU
platform.current_device = lambda self: "cpu"
platform.device_name = property(lambda self: "cpu")


def engine_of(model, deferred=True, **optimizer):
    """As verl builds it, but for what needs a checkpoint on disk or a GPU."""
    engine = object.__new__(FSDPEngineWithLMHead)
    engine.module, engine.rank, engine.scaler = model, dist.get_rank(), None
    optimizer = {"optimizer_impl": "snr_optim.integrations.verl", **optimizer}
    engine.optimizer_config = FSDPOptimizerConfig(lr=1e-2, **optimizer)
    engine.engine_config = FSDPEngineConfig(use_no_sync_for_gradient_accumulation=deferred)
    engine.ulysses_sequence_parallel_size, engine.ulysses_device_mesh = 1, None
    engine.use_ulysses_sp = engine._qat_enabled = engine.pad_to_length = engine.pass_packed_cu_seqlens = False
    engine._autocast_dtype = torch.float32
    engine.optimizer = engine._build_optimizer(model)
    engine.lr_scheduler = engine._build_lr_scheduler(engine.optimizer)
    return engine


def nested(rows):
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch(step, pads=0):
    """Sequences of unequal lengths, which verl divides by tokens: micro-batches of unequal numbers."""
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    lengths = (4, 16, 5, 15, 4, 6)
    lengths += (2,) * pads  # as verl pads a batch: two tokens, neither of which is trained on
    ids = [torch.randint(2, 12, (n,), generator=generator) for n in lengths]
    data = tu.get_tensordict(
        {
            "input_ids": nested(ids),
            "position_ids": nested([torch.arange(n) for n in lengths]),
            "attention_mask": nested([torch.ones(n, dtype=torch.long) for n in lengths]),
            "prompts": nested([row[:1] for row in ids]),
            "responses": nested([row[1:] for row in ids]),
            "loss_mask": nested([torch.full((n - 1,), float(n > 2)) for n in lengths]),
        }
    )
    tu.assign_non_tensor(
        data, use_remove_padding=False, use_dynamic_bsz=True, max_token_len_per_gpu=24, use_fused_kernels=False,
        pad_mode=DatasetPadMode.NO_PADDING, temperature=1.0, global_batch_size=6, calculate_entropy=False,
    )  # fmt: skip
    return data


seen = []


def loss(model_output, data, dp_group=None):
    rows = list(zip(data["input_ids"].unbind(), data["loss_mask"].unbind(), strict=True))
    seen.append([row.clone() for row, trained in rows if trained.any()])
    log_probs = zip(model_output["log_probs"].unbind(), data["loss_mask"].unbind(), strict=True)
    return -sum((row[:-1] * trained).sum() for row, trained in log_probs) / 6, {}


def gradient(model, rows):
    """Of one micro-batch on an unsharded model, one sequence after the other."""
    total = 0.0
    for row in rows:
        log_probs = model(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
        total = total - log_probs.gather(1, row[1:, None]).sum() / 6
    model.zero_grad()
    total.backward()
    return [p.grad.clone() for p in model.parameters()]


def moments_by_hand(weights):
    model = tiny_qwen3()
    model.load_state_dict(weights)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, seen)
    rows = [micro_batch for rank in parts for micro_batch in rank]
    sizes = [len(micro_batch) for micro_batch in rows]
    assert len(set(sizes)) > 1
    shares = [size / sum(sizes) for size in sizes]
    # A sum over sequences, averaged over ranks: each is its share of the batch's gradient.
    of_parts = [
        [g / dist.get_world_size() / share for g in gradient(model, micro_batch)]
        for micro_batch, share in zip(rows, shares, strict=True)
    ]
    return GradientMoments.from_gradients(of_parts, shares=shares)


def whole(model):
    return {name: value.full_tensor() for name, value in model.state_dict().items()}


def sharded():
    model = tiny_qwen3()
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def measured_steps(deferred, optimizer, pads):
    model = sharded()
    options = {"optimizer": optimizer, "override_optimizer_config": {"snr": {"smoothing": 0.0}}}
    engine = engine_of(model, deferred, **options)
    for step in range(2):
        seen.clear()
        weights = whole(model)
        engine.infer_batch(batch(step, pads), loss)  # measures nothing
        seen.clear()
        outputs = engine.train_batch(batch(step, pads), loss)
        expected = moments_by_hand(weights)
        factor = min(max(float(expected.lr_factor), 0.01), 1.0)
        assert outputs["metrics"]["snr/factor"] == [pytest.approx(factor, rel=1e-4)]
        assert outputs["metrics"]["snr/observations"] == [step + 1]
        assert engine.lr_scheduler_step() == pytest.approx(1e-2 * factor, rel=1e-4)  # what verl logs
        assert engine.optimizer.param_groups[0]["lr"] == 1e-2
    assert (
        float(engine.optimizer.steps.handle.moments.num_sub_batches) == 2 * len(seen)
        if dist.get_world_size() == 2
        else True
    )
    state = engine.lr_scheduler.state_dict()
    resumed = engine_of(sharded(), deferred, **options)
    resumed.lr_scheduler.load_state_dict(state)
    assert resumed.optimizer.steps.scheduler.factor == engine.optimizer.steps.scheduler.factor
    assert resumed.lr_scheduler.last_epoch == engine.lr_scheduler.last_epoch == 2
    return engine


def statistics_of_another_part_of_the_run_are_left_out(engine):
    plain = engine_of(sharded(), optimizer="AdamW", optimizer_impl="torch.optim").lr_scheduler
    without = plain.state_dict()
    plain.load_state_dict(engine.lr_scheduler.state_dict())
    plain.step()
    resumed = engine_of(sharded(), optimizer="SNRAdamW")
    for state in (plain.state_dict(), without):
        resumed.lr_scheduler.load_state_dict(state)
        assert resumed.optimizer.steps.scheduler.metrics()["observations"] == 0


def an_optimizer_of_torch_is_left_alone():
    engine = engine_of(sharded(), optimizer="AdamW", optimizer_impl="torch.optim")
    outputs = engine.train_batch(batch(0), loss)
    assert not any(name.startswith("snr/") for name in outputs["metrics"])
    assert type(engine.lr_scheduler).__name__ == "LambdaLR"


def what_cannot_be_measured_is_refused():
    if dist.get_world_size() > 1:
        with pytest.raises(RuntimeError, match=r"SNRAdamW: .*In verl: strategy=fsdp2 of actor or critic"):
            engine_of(tiny_qwen3(), optimizer="SNRAdamW")
    engine = engine_of(sharded(), optimizer="AdamW", optimizer_impl="torch.optim")
    engine.optimizer_config = FSDPOptimizerConfig(
        lr=1e-2, optimizer_impl="snr_optim.integrations.verl", optimizer="SNRSGD"
    )
    engine.ulysses_sequence_parallel_size = 2
    with pytest.raises(RuntimeError, match="ulysses_sequence_parallel_size: parts of a sequence"):
        engine._build_optimizer(engine.module)
    engine.ulysses_sequence_parallel_size = 1
    problems["verl.workers.engine.fsdp.transformer_impl.FSDPEngine.x"] = "is not there"
    with pytest.raises(RuntimeError, match="this version of verl is laid out differently"):
        engine._build_optimizer(engine.module)
    problems.clear()
    engine = engine_of(sharded(), optimizer="SNRSGD")
    with pytest.raises(RuntimeError, match="its backward pass is not where verl has it"):
        engine.forward_step(batch(0), loss_function=loss, forward_only=False)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    statistics_of_another_part_of_the_run_are_left_out(measured_steps(True, "SNRAdamW", pads=0))
    measured_steps(False, "SNRSGD", pads=3)
    an_optimizer_of_torch_is_left_alone()
    what_cannot_be_measured_is_refused()
    Path(sys.argv[1], f"passed{dist.get_rank()}").touch()
    leave_together()
