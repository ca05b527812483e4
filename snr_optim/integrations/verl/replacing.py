"""Replacing a function of verl, and saying so where that is not possible.

Here: ``replace``, and the record of what was and what could not be replaced. A version of verl that is laid out
differently must go on working for those who do not use this library. So what does not fit is kept in ``problems`` and
logged, and raises only where somebody needs it.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

problems: dict[str, str] = {}  # why something was not replaced, by its name
replaced: list[str] = []


def replace(
    owner: ModuleType | type, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]], takes: list[str]
) -> None:
    """Put ``make(original)`` in the place of ``owner.name``, once.

    Args:
        owner: the module or the class.
        name: of the function or method. Where there is none, the problem is recorded and nothing is changed.
        make: what makes the replacement from the original.
        takes: parameters that the original must have; the same holds where one is missing.
    """
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


def guarded(change: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    """Return a ``change`` of a module that records its errors instead of raising them while verl imports the module."""

    def changed(module: ModuleType) -> None:
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
