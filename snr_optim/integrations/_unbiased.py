"""Settings of a trainer that may bias the gradient, and what to say of those that do.

Here: what the tables of the trainers are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

MISSING = object()  # a setting that this version does not have
UNCLIPPED = 1e6  # a limit for the norm of a gradient that is none


class Setting(NamedTuple):
    """A setting that may bias the gradient.

    Attributes:
        name: of the config.
        fine: whether a value, in its config, is harmless.
        why: what is wrong otherwise.
        instead: what to set.
    """

    name: str
    fine: Callable[[Any, Any], bool]
    why: str
    instead: str


def one_of(*values: Any) -> Callable[[Any, Any], bool]:
    return lambda value, config: value in values


def findings(settings: Iterable[Setting], config: Any, look: Callable[[Any, str], Any]) -> list[str]:
    """A sentence for each setting that is not fine; ``look(config, name)`` is its value, or MISSING.

    Raises:
        TypeError: the config has none of the settings.
    """
    values = [(setting, look(config, setting.name)) for setting in settings]
    known = [(setting, value) for setting, value in values if value is not MISSING]
    if not known:
        raise TypeError(f"expected the config of a trainer, with {values[0][0].name} and others; got {config!r}")
    return [
        f"{setting.name}={value!r} {setting.why}: set {setting.instead}"
        for setting, value in known
        if not setting.fine(value, config)
    ]
