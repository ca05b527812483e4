"""One batch from the parts that data-parallel ranks hold, so that each baseline sees all outputs of its prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snr_optim.baseline.inputs import EXACT_UP_TO, Batch, of_groups
from snr_optim.prompt_groups import PromptGroups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def gather(local: Callable[[], Batch], group: ProcessGroup) -> tuple[Batch, slice]:
    """All ranks' outputs in the order of ranks, and which of them are this rank's.

    Three numbers per reward are sent. A rank whose batch is refused says so before anything else is sent, so that no
    other rank waits for it.

    Args:
        local: makes this rank's batch, or raises.
        group: the ranks.

    Raises:
        Exception: what ``local`` raised.
        ValueError: another rank's ``local`` raised, or the batches do not belong together.
    """
    import torch.distributed as dist

    rank, size = dist.get_rank(group), dist.get_world_size(group)
    device = _device_of(group)
    error: Exception | None = None
    header = [0] * 7
    try:
        batch = local()
        header = [1, len(batch.rewards), *_signature(batch)]
    except Exception as raised:
        error = raised
    table = _all_rows(torch.tensor([header], device=device), [1] * size, group).tolist()
    if error is not None:
        raise error
    failed = [other for other, row in enumerate(table) if not row[0]]
    if failed:
        raise ValueError(f"process_group: the batch of rank {failed[0]} was refused, see its error")
    if any(row[2:] != table[0][2:] for row in table):
        raise ValueError(
            "process_group: expected all ranks to agree on the dimensions and length of rewards, on ids or a size for "
            f"groups, on prompts or none, and on the precision; got {[row[2:] for row in table]}"
        )

    index = batch.groups.index
    columns = [batch.rewards.flatten(1) if batch.rewards.dim() > 1 else batch.rewards[:, None]]
    scored = torch.ones_like(batch.rewards) if batch.scored is None else batch.scored
    columns += [batch.weights.view_as(columns[0]), scored.view_as(columns[0])]
    floats = _all_rows(torch.cat(columns, dim=1).double().to(device), [row[1] for row in table], group)
    ids = batch.groups_given if batch.groups_given is not None else index
    integers = torch.stack(
        [ids, torch.full_like(ids, rank), *([] if batch.prompts is None else [batch.prompts[index]])]
    )
    integers = _all_rows(integers.T.to(device), [row[1] for row in table], group)

    width = columns[0].shape[1]
    coarse = batch.rewards.dim() > 1 and width * len(floats) > EXACT_UP_TO and not batch.float64_given
    floats = floats.to(batch.rewards.device, torch.float32 if coarse else torch.float64)
    rewards, weights, scored = torch.split(floats, width, dim=1)
    integers = integers.to(batch.rewards.device)
    shape = (len(floats), *batch.rewards.shape[1:])
    of_rank = integers[:, :2] if batch.groups_given is None else integers[:, :1]
    _, ids = torch.unique(of_rank, dim=0, return_inverse=True)
    groups = PromptGroups.of(ids, len(floats), batch.rewards.device)
    whole = Batch(
        rewards.reshape(shape), weights.reshape(shape), scored.reshape(shape), groups,
        None if batch.prompts is None else of_groups("prompts", integers[:, 2], groups),
    )  # fmt: skip
    start = sum(row[1] for row in table[:rank])
    return whole, slice(start, start + len(batch.rewards))


def _signature(batch: Batch) -> list[int]:
    """What has to be the same on all ranks."""
    columns = batch.rewards.shape[1] if batch.rewards.dim() > 1 else 0
    return [
        batch.rewards.dim(), columns, int(batch.groups_given is not None), int(batch.prompts is not None),
        int(batch.float64_given),
    ]  # fmt: skip


def _device_of(group: ProcessGroup) -> torch.device:
    """Where the group's collectives work; the same on all ranks, whatever was handed to them."""
    import torch.distributed as dist

    devices = [part.split(":")[0] for part in str(dist.get_backend_config(group)).split(",")]
    return torch.device("cpu" if "cpu" in devices else devices[0])


def _all_rows(rows: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    """``[B_rank, n]`` of every rank, one below the other."""
    import torch.distributed as dist

    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
