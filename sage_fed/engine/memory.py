"""Memory for weights: on the host in large pages where the kernel gives them.

A gigabyte in small pages takes longer to be found page by page than to be read from the page
cache, and every decode step walks through all of it. Fails with torch's own error, or with
`MemoryError`, where there is not enough.
"""

from __future__ import annotations

import mmap
import sys

import torch

_LARGE_NBYTES = 8 * 2**20
"""From here on a mapping of its own pays; four large pages of 2 MiB."""


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor whose values are undefined (zeros where it is a mapping of its own)."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    if device.type != "cpu" or nbytes < _LARGE_NBYTES or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes") from error
    return torch.frombuffer(pages, dtype=dtype).view(shape)
