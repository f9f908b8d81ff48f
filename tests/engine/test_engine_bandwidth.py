"""The limit that decoding is measured against."""

from __future__ import annotations

import pytest
import torch

from sage_fed.engine import read_bandwidth_bytes_per_s
from sage_fed.errors import ModelLoadError


def test_bandwidth_is_a_plausible_speed() -> None:
    """Any machine that runs this reads between 100 MB/s and 100 TB/s."""
    assert 1e8 < read_bandwidth_bytes_per_s("cpu") < 1e14


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_is_named() -> None:
    """There is no quiet measurement of another device."""
    with pytest.raises(ModelLoadError, match="cuda:0"):
        read_bandwidth_bytes_per_s("cuda:0")
