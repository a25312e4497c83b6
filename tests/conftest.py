"""Shared by all tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Tiny models only wait for each other's threads.
torch.set_num_threads(1)

# A slow machine is not a wrong result.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first: processes that share the tests then end together."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
