"""One file for what a baseline has learned, which every trainer keeps beside a checkpoint of its own.

Here: the name of that file, how it is written and how it is read. Where a trainer keeps its checkpoints, and when it
writes them, belongs in the trainer's own folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from warnings import warn

import torch

from snr_optim.baseline import GradWeightedBaseline

BASELINE_FILE = "snr_optim_baseline.pt"
WAY_OUT = "Build the baseline with the settings it was saved with, or delete the file to let it begin anew"


def save_baseline(baseline: GradWeightedBaseline, path: str | os.PathLike[str]) -> None:
    """Write the state of a baseline, and the settings that it was learned with, in one piece or not at all.

    The file is written under another name first and then renamed, so that a run which is killed meanwhile leaves the
    old file or none. Missing folders are made.

    Args:
        baseline: its state and its settings are written.
        path: the file.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    content = {"settings": baseline.extra_repr(), "state": baseline.state_dict()}
    try:
        with open(unfinished, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # the new name must not survive a crash that the bytes do not
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def load_baseline(baseline: GradWeightedBaseline, path: str | os.PathLike[str], way_out: str = WAY_OUT) -> bool:
    """Let a baseline go on, bit for bit, from the state that :func:`save_baseline` wrote.

    The settings stay those of the constructor. Where the state suits them although some differ (``decay``,
    ``leave_one_out``), a warning names both.

    Args:
        baseline: takes over the state; it is unchanged where an error is raised.
        path: the file; a checkpoint that was made without a baseline has none.
        way_out: what the user can do where the file does not suit the baseline, in the words of the trainer.

    Returns:
        Whether there was such a file.

    Raises:
        ValueError: the file was not written by :func:`save_baseline`, it is damaged, or the baseline has settings that
            the state does not suit. The message names the file, what is wrong with it, and the way out.
        OSError: the file cannot be opened.

    Example:
        >>> import tempfile
        >>> learned, resumed = GradWeightedBaseline(), GradWeightedBaseline()
        >>> learned.update(torch.tensor([1.0, 0.0]), groups=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_baseline(learned, f"{folder}/{BASELINE_FILE}")
        ...     load_baseline(resumed, f"{folder}/{BASELINE_FILE}")
        True
        >>> resumed.metrics() == learned.metrics()
        True
    """
    if not os.path.isfile(path):
        return False
    settings, state = _content(path, way_out)
    ours = baseline.extra_repr()
    both = f"it was saved by GradWeightedBaseline({settings}), and this one is GradWeightedBaseline({ours})"
    try:
        baseline.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = f"{error}; {both}" if settings != ours else str(error)
        raise ValueError(f"{path}: {reason}. {way_out}") from error
    if settings != ours:
        warn(f"{path}: {both}. The settings of this one hold from now on", stacklevel=2)
    return True


def _content(path: str | os.PathLike[str], way_out: str) -> tuple[str, dict[str, Any]]:
    """The settings and the state in a file."""
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except OSError:
        raise  # it names the file itself
    except Exception as error:  # of pickle, zipfile or torch, depending on where the damage is
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{path}: expected the state of a baseline, but it cannot be read: {reason}. {way_out}"
        ) from error
    if not isinstance(content, dict) or set(content) != {"settings", "state"}:
        raise ValueError(f"{path}: expected the settings and the state of a baseline. {way_out}")
    return content["settings"], content["state"]
