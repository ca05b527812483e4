"""Settings of a trainer that may bias the gradient, and what to say about those that do.

Here: what the table of settings in each trainer's folder is made of, and the function that reads such a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

MISSING = object()  # the value of a setting that this version of the trainer does not have
UNCLIPPED = 1e6  # no gradient has such a norm, so a limit of this size clips nothing


class Setting(NamedTuple):
    """A setting that may bias the gradient.

    Attributes:
        name: its name in the config.
        is_harmless: whether a value, in its config, leaves the gradient unbiased.
        why: what is wrong with another value.
        instead: what to set.
    """

    name: str
    is_harmless: Callable[[Any, Any], bool]
    why: str
    instead: str


def one_of(*values: object) -> Callable[[Any, Any], bool]:
    """Return an ``is_harmless`` for a setting that has to be one of these values, whatever else the config says."""
    return lambda value, config: value in values


def findings(settings: Iterable[Setting], config: object, value_of: Callable[[Any, str], Any]) -> list[str]:
    """Return a sentence for each setting whose value is not harmless.

    Args:
        settings: the table of a trainer.
        config: the config of that trainer.
        value_of: ``value_of(config, name)`` is the value of a setting, or MISSING.

    Raises:
        TypeError: the config has none of the settings.
    """
    values = [(setting, value_of(config, setting.name)) for setting in settings]
    known = [(setting, value) for setting, value in values if value is not MISSING]
    if not known:
        raise TypeError(f"expected the config of a trainer, with {values[0][0].name} and others; got {config!r}")
    return [
        f"{setting.name}={value!r} {setting.why}: set {setting.instead}"
        for setting, value in known
        if not setting.is_harmless(value, config)
    ]


def attribute_of(config: object, name: str) -> Any:
    """Return a setting of a config that holds its settings as attributes, or MISSING."""
    return getattr(config, name, MISSING)
