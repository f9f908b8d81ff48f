"""How many threads one forward pass on the CPU may use: a setting of the process.

Torch keeps it for the whole process, so the daemon sets it once, before any engine is loaded.
"""

from __future__ import annotations

import torch


def set_cpu_threads(num_threads: int) -> None:
    """Use `num_threads` for one forward pass on the CPU; 0 leaves torch's own choice."""
    if num_threads:
        torch.set_num_threads(num_threads)
