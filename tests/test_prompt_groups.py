"""Sums over groups against loops, for ragged and scattered groups."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snr_optim.prompt_groups import PromptGroups


@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.integers(-3, 3), st.floats(0, 1e12)), max_size=20))
def test_sums_equal_loops(rows):
    ids = [group for group, _ in rows]
    values = torch.tensor([value for _, value in rows], dtype=torch.float64)
    groups = PromptGroups.of(torch.tensor(ids, dtype=torch.long), batch=len(rows))

    def loop(keep):
        sums = [sum(values[j].item() for j in range(len(ids)) if keep(i, j)) for i in range(len(ids))]
        return torch.tensor(sums, dtype=torch.float64)

    # Non-negative terms, none subtracted: the relative error of a sum of 20 float64 numbers.
    assert torch.allclose(groups.sum(values)[groups.index], loop(lambda i, j: ids[i] == ids[j]), rtol=1e-14, atol=0)
    others = loop(lambda i, j: ids[i] == ids[j] and i != j)
    assert torch.allclose(groups.sum_of_others(values), others, rtol=1e-14, atol=0)
    other_groups = loop(lambda i, j: ids[i] != ids[j])
    assert torch.allclose(groups.sum_of_other_groups(values), other_groups, rtol=1e-14, atol=0)


def test_a_size_is_the_same_as_its_ids():
    by_size, by_id = PromptGroups.of(3, batch=12), PromptGroups.of(torch.arange(12) // 3 * 7, batch=12)
    values = torch.rand(12, 2)
    assert torch.equal(by_size.sum_of_others(values), by_id.sum_of_others(values))
    assert torch.equal(by_size.sizes, by_id.sizes)


def test_large_ragged_batches_need_no_dense_table():
    ids = torch.cat([torch.zeros(50_000, dtype=torch.long), torch.arange(1, 50_001)])
    others = PromptGroups.of(ids, batch=100_000).sum_of_others(torch.ones(100_000, dtype=torch.float64))
    assert others[:50_000].eq(49_999).all()
    assert others[50_000:].eq(0).all()
