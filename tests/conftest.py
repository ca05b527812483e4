"""Every test draws the same numbers on every run: what fails, fails again, and chance cannot turn main red."""

from __future__ import annotations

import zlib

import pytest
import torch
from hypothesis import settings

# To look for new examples: pytest --hypothesis-profile=explore
settings.register_profile("explore", deadline=None)
settings.register_profile("repeat", deadline=None, derandomize=True)
settings.load_profile("repeat")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))  # by its name: independent of order
