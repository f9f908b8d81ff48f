"""Training one model by several single-threaded worker processes on one machine.

Owns: starting the workers, summing their gradients, sharing the parameters each has updated.
Does not know: models, data, optimisers.

Why processes and not torch's threads: a threaded product waits for its slowest thread hundreds of
times a step, workers wait for each other twice. On 2 cores that others use too, threads fell to a
quarter of their speed (1.1k against 4.6k tokens/s), workers lose only what the others take.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True, slots=True)
class Crew:
    """This process's place among the workers."""

    rank: int
    num_workers: int

    @property
    def leads(self) -> bool:
        """Whether this worker reports and saves."""
        return self.rank == 0

    def owner(self, index: int) -> int:
        """The worker that updates the `index`-th shared-out part."""
        return index % self.num_workers

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by the sum over all workers."""
        if self.num_workers == 1:
            return
        flat = torch.cat([_gradient(p).flatten() for p in parameters])
        dist.all_reduce(flat)
        for parameter, total in zip(parameters, _unflatten(flat, parameters), strict=True):
            parameter.grad = total

    def share(self, parameters_by_owner: Sequence[Sequence[Tensor]]) -> None:
        """Give everybody the parameters that each owner has updated."""
        if self.num_workers == 1:
            return
        for owner, parameters in enumerate(parameters_by_owner):
            flat = torch.cat([p.detach().flatten() for p in parameters])
            dist.broadcast(flat, src=owner)
            if owner != self.rank:
                for parameter, value in zip(parameters, _unflatten(flat, parameters), strict=True):
                    parameter.detach().copy_(value)

    def gather(self, mine: object) -> list[object] | None:
        """Everybody's object at the leader, in the order of ranks; None elsewhere."""
        if self.num_workers == 1:
            return [mine]
        gathered: list[object] | None = [None] * self.num_workers if self.leads else None
        dist.gather_object(mine, gathered, dst=0)
        return gathered


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([p.numel() for p in like])
    return [part.view_as(p) for part, p in zip(parts, like, strict=True)]


def _run(
    rank: int, num_workers: int, meeting_point: str, work: Callable[..., None], *args: object
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting_point}",
        rank=rank,
        world_size=num_workers,
        timeout=_TIMEOUT,
    )
    try:
        work(Crew(rank, num_workers), *args)
    finally:
        dist.destroy_process_group()


def run_workers(num_workers: int, work: Callable[..., None], *args: object) -> None:
    """Call `work(crew, *args)` in every worker; with one worker, in this process.

    A worker that raises ends the others, and its traceback is raised here.
    """
    if num_workers == 1:
        torch.set_num_threads(1)
        work(Crew(0, 1), *args)
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the workers share one machine
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = str(Path(folder) / "meeting-point")
        mp.spawn(_run, (num_workers, meeting_point, work, *args), nprocs=num_workers, daemon=True)
