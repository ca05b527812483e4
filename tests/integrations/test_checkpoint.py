"""The file of a baseline beside a trainer's checkpoint: what it holds, how it is written, and what it refuses."""

from __future__ import annotations

import warnings

import pytest
import torch

from snr_optim import GradWeightedBaseline
from snr_optim.integrations._checkpoint import BASELINE_FILE, load_baseline, save_baseline


def learned(seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    baseline = GradWeightedBaseline(**settings)
    for _ in range(3):
        baseline.update(torch.rand(8, generator=generator), torch.rand(8, generator=generator), groups=4)
    return baseline


def states_are_equal(one, other):
    one, other = (each.state_dict()["_extra_state"] for each in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_baseline_goes_on_bit_for_bit_from_a_folder_that_was_made_for_it(tmp_path):
    before, path = learned(), tmp_path / "checkpoint-3" / BASELINE_FILE
    save_baseline(before, path)
    after = GradWeightedBaseline()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_baseline(after, path)
    assert states_are_equal(before, after)
    assert [each.name for each in path.parent.iterdir()] == [BASELINE_FILE]


def test_without_a_file_nothing_changes(tmp_path):
    before, after = learned(), learned()
    assert not load_baseline(after, tmp_path / BASELINE_FILE)
    assert states_are_equal(before, after)


def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / BASELINE_FILE
    save_baseline(learned(), path)
    before = path.read_bytes()

    def fails(content, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space left"):
        save_baseline(learned(seed=1), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: torch.save(learned().state_dict(), path),
        lambda path: torch.save(learned(), path),  # a pickle, which is not loaded
        lambda path: torch.save({"settings": "", "state": {"weight": torch.ones(1)}}, path),
    ],
    ids=["cut in half", "empty", "a state alone", "a pickle", "another state"],
)
def test_a_file_of_another_kind_is_refused_with_its_name_and_the_way_out(tmp_path, change):
    path, baseline = tmp_path / BASELINE_FILE, learned()
    save_baseline(baseline, path)
    change(path)
    with pytest.raises(ValueError, match=rf"{BASELINE_FILE}: (?s:.*)delete the file to let it begin anew"):
        load_baseline(baseline, path)
    assert states_are_equal(baseline, learned())


def test_settings_that_the_state_does_not_suit_are_both_named(tmp_path):
    path, baseline = tmp_path / BASELINE_FILE, learned(scope="batch")
    save_baseline(learned(), path)
    message = rf"{BASELINE_FILE}: .*saved by .*scope='shrink'.*this one is .*scope='batch'.*Try another"
    with pytest.raises(ValueError, match=message):
        load_baseline(baseline, path, way_out="Try another")
    assert states_are_equal(baseline, learned(scope="batch"))


def test_settings_that_differ_but_suit_the_state_are_said_and_hold(tmp_path):
    path, baseline = tmp_path / BASELINE_FILE, GradWeightedBaseline(decay=0.9)
    before = learned()
    save_baseline(before, path)
    with pytest.warns(UserWarning, match=r"decay=0\.5.* decay=0\.9.*hold from now on"):
        assert load_baseline(baseline, path)
    assert baseline.decay == 0.9
    assert states_are_equal(baseline, before)
