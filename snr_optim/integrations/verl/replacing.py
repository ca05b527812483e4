"""Putting one function in the place of another, and saying so where that is not possible.

A version of verl that is laid out differently must go on working for those who do not use us: what does not fit is
kept in ``problems`` and logged, and whoever needed it says so when it is used.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

problems: dict[str, str] = {}  # by what should have been replaced
replaced: list[str] = []


def replace(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]], takes: list[str]) -> None:
    """Put ``make(original)`` in the place of ``owner.name``, which must exist and have these parameters. Once."""
    where = f"{getattr(owner, '__module__', '')}.{owner.__name__}.{name}".lstrip(".")
    original = getattr(owner, name, None)
    if original is None:
        return _fail(where, "is not there")
    if getattr(original, "_snr_optim", False):
        return
    missing = [each for each in takes if each not in inspect.signature(original).parameters]
    if missing:
        return _fail(where, f"has no parameter {', '.join(missing)}")
    replacement = functools.wraps(original)(make(original))
    replacement._snr_optim = True  # type: ignore[attr-defined]
    setattr(owner, name, replacement)
    replaced.append(where)


def guarded(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """A ``change`` of a module whose errors are kept, not raised while verl imports it."""

    def changed(module: Any) -> None:
        try:
            change(module)
        except Exception as error:
            _fail(module.__name__, repr(error))

    return changed


def _fail(where: str, reason: str) -> None:
    problems[where] = reason
    logging.getLogger("snr_optim").error(
        "snr-optim does not know this version of verl: %s %s. Its estimators and optimizers may refuse to work; "
        "`python -m snr_optim.integrations.verl check` tells more.",
        where,
        reason,
    )
