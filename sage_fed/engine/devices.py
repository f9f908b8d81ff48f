"""Which device a name stands for.

A device that was named is that one or an error, never another one; only `auto` leaves the
choice to what is there. Fails with `ModelLoadError`.
"""

from __future__ import annotations

import torch

from sage_fed.errors import ModelLoadError


def resolve_device(name: str) -> torch.device:
    """Return the device that was asked for.

    Raises:
        ModelLoadError: it is none, or it is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelLoadError(f"device {name!r} is not a device; use cpu or cuda:N") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ModelLoadError(f"device {name!r} is not supported; use cpu or cuda:N")
    index = device.index or 0
    if index >= (count := _cuda_devices()):
        raise ModelLoadError(
            f"device {name} was asked for, but {_torch_build()} sees {count} CUDA devices; "
            "ask for cpu if that is what you want"
        )
    return torch.device("cuda", index)


def device_at_hand() -> tuple[str, str]:
    """Return the first CUDA device, or else the CPU and why; in words, "" for no reason."""
    if _cuda_devices():
        return "cuda:0", ""
    return "cpu", f"{_torch_build()} sees no CUDA device"


def _cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _torch_build() -> str:
    cuda = torch.version.cuda
    return f"torch ({'built without CUDA' if cuda is None else f'for CUDA {cuda}'})"
