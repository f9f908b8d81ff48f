"""The trace of the CUDA path in its small form: the same steps and counts, on the CPU's tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sage_fed.core import Sampling
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.engine.random_checkpoint import Shape, plan_checkpoint

BENCH = Path(__file__).parent.parent / "bench"
SMALL = Shape(64, 2, 4, 2, 96, 320, tied=True, tokenizer_ids=300, max_position=512)


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("cuda_trace")


@pytest.fixture
def traced(trace: ModuleType, tmp_path: Path) -> Callable[..., Any]:
    """Trace a kind of step; its counts."""
    trace.write_zeros(plan_checkpoint(SMALL), tmp_path / "model")
    launches = trace.Launches(torch.device("cpu"))
    options = EngineOptions(
        str(tmp_path / "model"), 1 << 22, precision="bf16", kernels="torch", num_valid_ids=300
    )
    engine: Engine = load_engine(options, lambda _: None, trace.Replayed(launches, warms_up=True))

    def of(*rows: int, context: int = 128, **fields: Any) -> Any:  # noqa: ANN401 - the script's own
        case = trace.Case("here", rows, context, rows if context else (1,) * len(rows), **fields)
        with launches:
            return trace.trace_step(engine, launches, case)

    return of


def test_steps_of_decoding_and_verifying_are_one_replay_however_many_rows(
    traced: Callable[..., Any],
) -> None:
    """What the host queues depends on neither; the work inside is one operation more with rows."""
    counts = [traced(*rows) for rows in ((1,), (1,) * 8, (2,), (9,), (17,), (9,) * 4)]
    assert [1] * 6 == [c.replays for c in counts]
    assert 1 == len({c.launches for c in counts})
    assert counts[0].launches < 8
    assert 1 == counts[3].kernels - counts[0].kernels
    assert {"bfloat16"} == counts[0].product_types


def test_what_has_no_bucket_is_queued_operation_by_operation(
    traced: Callable[..., Any],
) -> None:
    prompt, long_draft = traced(40, context=0), traced(33)
    for counts in (prompt, long_draft):
        assert 0 == counts.replays
        assert counts.launches >= counts.kernels > 30


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.8), Sampling(temperature=0.8, top_k=50, top_p=0.9),
     Sampling(temperature=0.8, top_p=0.9), Sampling(repetition_penalty=1.2),
     Sampling(top_logprobs=5)],
    ids=repr,
)  # fmt: skip
def test_no_way_to_draw_waits_for_the_device(
    traced: Callable[..., Any], sampling: Sampling
) -> None:
    """Rows of one sequence or of many."""
    for rows in ((1,) * 4, (5, 1, 3)):
        counts = traced(*rows, sampling=sampling)
        assert 1 == counts.replays


def test_a_wait_of_the_host_is_noticed(trace: ModuleType) -> None:
    """A value that is read, a mask that is counted, a copy that blocks or is of unpinned memory."""
    on_host = torch.arange(4)
    with trace.Launches(torch.device("cpu")):
        for waits in (lambda: int(on_host[2]), lambda: on_host[on_host > 1], on_host.nonzero):
            with pytest.raises(trace.HostWaits):
                waits()
    with trace.Launches(torch.device("meta")) as launches:
        there, here = torch.empty(4, device="meta"), torch.empty(4)
        for queue in (
            lambda: there.copy_(here),
            lambda: there.copy_(here, non_blocking=True),
            lambda: torch.where(there > 0, there, torch.empty(())),
        ):
            with pytest.raises(trace.HostWaits):
                queue()
        launches.begin()
        there.add_(1).mul_(there)[1:].neg_()
        assert (3, 3) == (launches.counts.kernels, launches.counts.launches)
