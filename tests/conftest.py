"""Fixtures and marker handling shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import warp as wp

wp.config.log_level = wp.LOG_WARNING  # no banner, no line per loaded module

CHECKOUT = Path(__file__).resolve().parent.parent


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu`, with the reason, where Warp finds no CUDA device."""
    if item.get_closest_marker("gpu") and not wp.is_cuda_available():
        pytest.skip("needs a CUDA device, Warp finds none")


@pytest.fixture(scope="session")
def data() -> Path:
    """The real-data folder: NRC_DATA, else ../shared/data beside the checkout."""
    folder = Path(os.environ.get("NRC_DATA") or CHECKOUT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set NRC_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def device() -> wp.Device:
    """The device that tests run on unless they are marked `gpu`."""
    return wp.get_device("cpu")
