"""The CUDA path without a GPU: every step on tensors that have shapes, types, devices, no values.

A CUDA build of torch computes on fake tensors of `cuda:0` on a machine that has none. What would
fail there fails here: an operation over two devices, a value that the host would have to wait for.
What the device would have to do is counted, operation by operation:
`launches` are the operations that the host queues, a graph's replay being one; `kernels` are all
operations on the device, those inside a replay included (one of them may be several kernels, and
compiling makes fewer of them); `copies` cross between host and device; `bytes` are what the kernels
read and write at least, gathered rows counted and not their tables. `waits` are the host's for the
device: none while a step is queued and one, an event, for its results.
Loading reads a real file (zeros that take no disk) for the smaller model; the larger one's weights
are allocated only. Real are also the scheduler's words, steps and chunks; patched are what torch
asks a driver for: streams, events, free memory, the capability of a device (9.0).
Nothing here has run on a GPU: times, memory in use and what cuBLAS does are not known from it.

Run: make trace-cuda (an environment of its own: torch's CUDA build takes 5 GB).
Writes bench/results/cuda_trace.json. Fails at the first mismatch, wait or wrong type.
"""

# ruff: noqa: SLF001 - what is on the device is inside, and so is how torch dispatches
from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sage_fed.core import Sampling, Tier
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.engine import batch as batches
from sage_fed.engine import load as loading
from sage_fed.engine.cuda_graphs import Function, GraphForward, Work
from sage_fed.engine.precision import PRECISIONS
from sage_fed.engine.random_checkpoint import SHAPES, CheckpointPlan, _config, plan_checkpoint
from sage_fed.engine.tensor_file import header_bytes
from sage_fed.steps import BLOCK_SIZE, PENDING, Chunk, History, Step

CAPABILITY = (9, 0)
DEVICE_BYTES = 140 << 30
MAX_BATCH = 16
CONTEXT = 4096

WAITING = frozenset({
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2",
    "unique_dim", "repeat_interleave.Tensor", "bincount",
})  # fmt: skip
"""Operations whose result, or its shape, the host waits for."""

QUIET = frozenset({
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach",
    "_unsafe_view", "lift_fresh", "set_", "resize_",
})  # fmt: skip
"""Operations that queue nothing and return no view."""

PRODUCTS = frozenset({
    "linear", "mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_weight_int4pack_mm",
    "_weight_int4pack_mm_for_cpu",
})  # fmt: skip

GATHERS = frozenset({"index_select", "index", "gather", "embedding"})
SCATTERS = frozenset({"index_copy_", "index_put_", "index_fill_", "index_copy", "index_put"})


class HostWaits(AssertionError):
    """The host would wait for the device where it must not."""


@dataclass
class Counts:
    """What some of the work would make the device do."""

    launches: int = 0
    kernels: int = 0
    replays: int = 0
    copies: int = 0
    waits: int = 0
    bytes: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    queued: Counter[str] = field(default_factory=Counter)
    product_types: set[str] = field(default_factory=set)


class Launches(TorchDispatchMode):
    """Counts what is queued for `device`; an operation that waits for it is an error.

    On the CPU every operation counts as if that were the device, so that the same steps can be
    looked at where there is only a CPU's torch.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.counts = Counts()
        self._device = device
        self._replaying = False
        self._pinned: set[int] = set()
        self._kept: list[torch.Tensor] = []

    def begin(self) -> Counts:
        """Count anew from here; returns where."""
        self.counts = Counts()
        self._pinned.clear()
        self._kept.clear()
        return self.counts

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """What is inside is one launch."""
        self._replaying = True
        self.counts.launches += 1
        self.counts.replays += 1
        try:
            yield
        finally:
            self._replaying = False

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - torch's own
        types: Any,  # noqa: ANN401
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        if kwargs.get("pin_memory"):
            for result in results:
                self._pinned.add(_memory(result))
                self._kept.append(result)  # an address is another's once its owner is gone
        if any(tensor.device == self._device for tensor in (*given, *results)):
            self._note(func, name, args, kwargs, given, results)
        return made

    def _note(  # noqa: PLR0917
        self,
        func: Any,  # noqa: ANN401
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        given: list[torch.Tensor],
        results: list[torch.Tensor],
    ) -> None:
        if name in WAITING or str(func).removeprefix("aten.") in WAITING:
            raise HostWaits(f"{func} waits for the device")
        if name == "index" and any(
            isinstance(at, torch.Tensor) and at.dtype in {torch.bool, torch.uint8} for at in args[1]
        ):
            raise HostWaits("an index by a mask waits for the device")
        if name in QUIET or name.startswith("prim::") or _is_view(func):
            return
        counts = self.counts
        if len({tensor.device.type for tensor in (*given, *results)}) > 1:
            self._crosses(func, name, args, kwargs, given, results)
            return
        counts.kernels += 1
        counts.operations[name] += 1
        counts.bytes += _bytes(name, given, results)
        if not self._replaying:
            counts.launches += 1
            counts.queued[name] += 1
        if name in PRODUCTS:
            counts.product_types |= {_type(tensor) for tensor in given if tensor.dim() == 2}

    def _crosses(  # noqa: PLR0917
        self,
        func: Any,  # noqa: ANN401
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        given: list[torch.Tensor],
        results: list[torch.Tensor],
    ) -> None:
        if name == "fill_" and given[-1].dim() == 0:  # the host's number is an argument
            self.counts.kernels += 1
            self.counts.launches += not self._replaying
            return
        if name not in {"copy_", "_to_copy"}:
            raise HostWaits(f"{func} mixes the host's tensors with the device's")
        waits_not = kwargs.get("non_blocking") or (
            name == "copy_" and len(args) > 2 and args[2] is True
        )
        host = [tensor for tensor in (*given, *results) if tensor.device.type == "cpu"]
        if not waits_not or not all(_memory(tensor) in self._pinned for tensor in host):
            raise HostWaits(f"{func} of {[tuple(t.shape) for t in host]} waits for its copy")
        self.counts.copies += 1
        self.counts.launches += 1


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_view(func: Any) -> bool:  # noqa: ANN401
    returned = [one.alias_info for one in func._schema.returns]
    return bool(returned) and all(alias and not alias.is_write for alias in returned)


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(name: str, given: list[torch.Tensor], results: list[torch.Tensor]) -> int:
    made = sum(tensor.nbytes for tensor in results)
    if name in GATHERS:
        return 2 * made
    if name in SCATTERS:
        written = given[-1].nbytes if name.startswith(("index_copy", "index_put")) else 0
        return 2 * written + sum(t.nbytes for t in given[1:-1])
    own = {id(tensor) for tensor in results}
    return made + sum(tensor.nbytes for tensor in given if id(tensor) not in own)


class Replayed:
    """A `GraphCapture` that does the work again, as one launch.

    With `warms_up` once before, as a capture does; without, loading is quicker.
    """

    name = "graphs"

    def __init__(self, launches: Launches, *, warms_up: bool) -> None:
        self._launches = launches
        self._warms_up = warms_up

    def compile(self, function: Function, *, widened: bool) -> Function:  # noqa: ARG002
        """Return `function`: what a compiler makes of it is not known here."""
        return function

    def capture(self, work: Work) -> Work:
        """Do it once; a replay does it again."""
        if self._warms_up:
            work()

        def replay() -> None:
            with self._launches.replay():
                work()

        return replay


class FakeEvent:
    """`torch.cuda.Event` without a device."""

    waits = 0

    def __init__(self, enable_timing: bool = False) -> None:
        del enable_timing

    def record(self, stream: object = None) -> None:
        """Nothing to mark."""

    def synchronize(self) -> None:
        """The one wait of a step."""
        type(self).waits += 1

    def elapsed_time(self, other: FakeEvent) -> float:
        """Milliseconds; a number."""
        del other
        return 1.0


@contextlib.contextmanager
def without_a_driver() -> Iterator[None]:
    """Answer what torch asks a driver for as a device of the capability would."""
    waited = batches.ResultCopy.wait

    def wait(copy: batches.ResultCopy) -> torch.Tensor | None:
        results = waited(copy)
        if not isinstance(results, FakeTensor):
            return results
        with unset_fake_temporarily():
            return torch.zeros(tuple(results.shape), dtype=results.dtype)

    patches = {
        "sage_fed.engine.machine._cuda_devices": lambda: 1,
        "torch.cuda.Event": FakeEvent,
        "torch.cuda.current_stream": lambda *_: object(),
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.mem_get_info": lambda *_: (DEVICE_BYTES, DEVICE_BYTES),
        "torch.cuda.get_device_capability": lambda *_: CAPABILITY,
        "sage_fed.engine.batch.ResultCopy.wait": wait,
        # A fake buffer has no memory: what is read of the file goes to some other.
        "sage_fed.engine.tensor_file._bytes_of": lambda t: memoryview(bytearray(t.nbytes)),
    }
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch(name, value))
        yield


def write_zeros(plan: CheckpointPlan, directory: Path) -> None:
    """Write a checkpoint of zeros, whose files take no disk."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(_config(plan)))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(plan.shards):
        name = f"model-{number}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        tensors = {n: torch.empty(s, dtype=torch.bfloat16, device="meta") for n, s in shard.items()}
        header = header_bytes(tensors, {"format": "pt"})
        with (directory / name).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(plan.tensor_bytes(s) for s in shard.values()))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@dataclass(frozen=True, slots=True)
class Case:
    """A kind of step: `fed` new tokens of each sequence behind `context` cached ones."""

    name: str
    fed: tuple[int, ...]
    context: int
    draws: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    pending: bool = False
    captured: bool = False


RANDOM = Sampling(temperature=0.8, seed=3)
SAMPLINGS = {
    "random": RANDOM,
    "top_k 50, top_p 0.9": Sampling(temperature=0.8, seed=3, top_k=50, top_p=0.9),
    "top_p 0.9": Sampling(temperature=0.8, seed=3, top_p=0.9),
    "min_p 0.05": Sampling(temperature=0.8, seed=3, min_p=0.05),
    "penalties": Sampling(repetition_penalty=1.2, presence_penalty=0.5),
    "penalties, random": Sampling(temperature=0.8, seed=3, repetition_penalty=1.2),
    "top_logprobs 5": Sampling(top_logprobs=5),
    "random, top_logprobs 5": Sampling(temperature=0.8, seed=3, top_logprobs=5),
}

CASES = (
    Case("prefill", (500,), 0, (1,)),
    Case("prefill, three sequences", (500, 77, 3), 0, (1, 1, 1)),
    Case("chunked prefill, first", (256,), 0, (0,)),
    Case("chunked prefill, next", (256,), 256, (0,)),
    Case("chunked prefill, last", (200,), 512, (1,)),
    Case("mixed: prompt and decode", (256, 1, 1), 300, (0, 1, 1)),
    *(
        Case(f"decode, {count}", (1,) * count, 128, (1,) * count, captured=True)
        for count in (1, 2, 8, 16)
    ),
    Case("decode, 8, context 1,024", (1,) * 8, 1024, (1,) * 8, captured=True),
    Case("decode, 8, pending", (1,) * 8, 128, (1,) * 8, pending=True, captured=True),
    Case("decode, 17: no bucket", (1,) * 17, 128, (1,) * 17),
    *(
        Case(f"verify, {rows} rows", (rows,), 128, (rows,), captured=True)
        for rows in (2, 3, 5, 9, 17)
    ),
    Case("verify, 4 x 9 rows", (9,) * 4, 128, (9,) * 4, captured=True),
    Case("verify, ragged", (9, 1, 4, 1, 2), 128, (9, 1, 4, 1, 2), captured=True),
    Case("verify, 33 rows: no bucket", (33,), 128, (33,)),
    *(
        Case(f"decode, 8, {name}", (1,) * 8, 128, (1,) * 8, sampling, captured=True)
        for name, sampling in SAMPLINGS.items()
    ),
    *(
        Case(f"verify, 4 x 5 rows, {name}", (5,) * 4, 128, (5,) * 4, sampling, captured=True)
        for name, sampling in SAMPLINGS.items()
    ),
)


def chunks_of(case: Case) -> tuple[Chunk, ...]:
    """The step that a scheduler would build."""
    chunks, used = [], 0
    for seq_id, (fed, count) in enumerate(zip(case.fed, case.draws, strict=True)):
        length = case.context + fed
        num_blocks = -(-length // BLOCK_SIZE)
        blocks = tuple(range(used, used + num_blocks))
        used += num_blocks
        tokens = tuple(range(10, 10 + fed))
        history = History(case.sampling, tuple(range(40)))
        draft = tokens[len(tokens) - count + 1 :] if count else ()
        draws = tuple(history.draw(7 + row, draft[:row]) for row in range(count))
        if case.pending:
            tokens = (PENDING, *tokens[1:])
        chunks.append(Chunk(seq_id, case.context, tokens, blocks, draws))
    return tuple(chunks)


def trace_step(engine: Engine, launches: Launches, case: Case) -> Counts:
    """Queue the step, and then wait for it; what either would do.

    Raises:
        HostWaits: the host would have to wait while it queues, or not once for the results.
    """
    counts = launches.begin()
    before = FakeEvent.waits
    step = Step(Tier.TACTICAL, chunks_of(case))
    in_flight = engine.launch(step)
    if FakeEvent.waits != before:
        raise HostWaits(f"{case.name}: the host waits while it queues the step")
    with launches_paused():
        drawn = in_flight.wait()
    counts.waits = FakeEvent.waits - before
    if len(drawn) != sum(case.draws):
        raise AssertionError(f"{case.name}: {len(drawn)} tokens of {sum(case.draws)}")
    return counts


@contextlib.contextmanager
def launches_paused() -> Iterator[None]:
    """Let the host read its results."""
    with unset_fake_temporarily(), torch.utils._python_dispatch._disable_current_modes():
        yield


def check_types(engine: Engine, precision: str) -> None:
    """Hold what is on the device against what the precision declares."""
    forward = engine._forward
    assert isinstance(forward, GraphForward)
    declared = PRECISIONS[precision]
    cache, weights = forward._decoder._cache, forward._decoder._weights
    expected = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "dense": declared.compute}
    layer, head = weights.layers[0], weights.head
    found = {
        "cache": cache.pool.dtype,
        "norm": weights.norm.dtype,
        "logits": forward._logits.dtype if forward._logits is not None else None,
        "head": _stored_type(head),
    }
    wanted = {
        "cache": declared.compute,
        "norm": declared.compute,
        "logits": declared.compute,
        "head": expected[declared.head],
    }
    if declared.layers in expected:
        for name in ("qkv", "out", "gate_up", "down"):
            found[name] = _stored_type(getattr(layer, name))
            wanted[name] = expected[declared.layers]
    if found != wanted:
        raise AssertionError(f"{precision}: {found} is not {wanted}")
    for tensor in (cache.pool, weights.norm, forward.newest):
        if str(tensor.device) != "cuda:0":
            raise AssertionError(f"{precision}: a tensor is on {tensor.device}")


def _stored_type(linear: object) -> torch.dtype:
    stored: torch.Tensor = getattr(linear, "_weight", None)
    if stored is None:
        stored = linear._values  # type: ignore[attr-defined] # of the quantised ones
    return stored.dtype


def product_types(precision: str) -> set[str]:
    """The types of which matrices are multiplied."""
    declared = PRECISIONS[precision]
    if declared.layers == "fp8":
        return {"float8_e4m3fn", "float32"}  # the scales are matrices, too
    return {str(declared.compute).removeprefix("torch.")}


@dataclass(frozen=True, slots=True)
class Traced:
    """One kind of step of one model."""

    model: str
    precision: str
    step: str
    sequences: int
    rows: int
    context: int
    captured: bool
    launches: int
    kernels: int
    copies: int
    waits: int
    gigabytes: float


def trace_model(
    directory: Path, name: str, precision: str, *, reads: bool, every: bool
) -> tuple[dict[str, Any], list[Traced]]:
    """Load the model as it would be on a GPU, and trace every kind of step.

    With `reads` its file is read. With `every` all graphs are captured, not only those replayed,
    and tokens are drawn in every way.
    """
    began = time.monotonic()
    launches = Launches(torch.device("cuda", 0))
    capture = Replayed(launches, warms_up=every)
    options = EngineOptions(
        str(directory),
        kv_cache_bytes=4 << 30,
        device="cuda:0",
        precision=precision,
        max_context_tokens=CONTEXT,
        max_batch=MAX_BATCH,
        num_valid_ids=SHAPES[name].tokenizer_ids,
    )
    traced: list[Traced] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_a_driver())
        if not reads:
            stack.enter_context(mock.patch.object(loading, "load_weights", _allocated))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        engine = load_engine(options, lambda _: None, capture)
        check_types(engine, precision)
        forward = engine._forward
        assert isinstance(forward, GraphForward)
        num_graphs = len(forward._graphs)
        stack.enter_context(launches)
        trace_step(engine, launches, CASES[0])
        for case in CASES:
            # What is drawn, and how, is the same code for every precision: logits become fp32.
            if not every and case.sampling not in {Sampling(), RANDOM}:
                continue
            if case.pending:
                trace_step(engine, launches, Case("before", (1,) * 8, 127, (1,) * 8))
            counts = trace_step(engine, launches, case)
            _check_step(case, counts, precision)
            traced.append(_traced(name, precision, case, counts))
    loaded = {
        "model": name,
        "precision": precision,
        "weight_bytes": engine.info.weight_bytes,
        "step_bytes": engine.info.step_bytes,
        "graphs": num_graphs,
        "read": reads,
        "trace_s": round(time.monotonic() - began, 1),
    }
    return loaded, traced


def _allocated(make: Callable[[], Any], *_: object, **__: object) -> Any:  # noqa: ANN401
    return make().build()


def _check_step(case: Case, counts: Counts, precision: str) -> None:
    if counts.waits != 1:
        raise HostWaits(f"{case.name}: {counts.waits} waits for a step")
    if counts.replays != int(case.captured):
        raise AssertionError(f"{case.name}: {counts.replays} graphs replayed")
    if not counts.product_types <= product_types(precision):
        raise AssertionError(f"{case.name}: {precision} multiplies {counts.product_types}")


def _traced(model: str, precision: str, case: Case, counts: Counts) -> Traced:
    return Traced(
        model=model,
        precision=precision,
        step=case.name,
        sequences=len(case.fed),
        rows=sum(case.fed),
        context=case.context,
        captured=bool(counts.replays),
        launches=counts.launches,
        kernels=counts.kernels,
        copies=counts.copies,
        waits=counts.waits,
        gigabytes=round(counts.bytes / 1e9, 3),
    )


def main() -> None:
    """Trace every model, precision and kind of step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--models", nargs="+", default=["qwen2.5-0.5b", "qwen2.5-7b"])
    parser.add_argument(
        "--precisions", nargs="+", default=["bf16", *sorted({*PRECISIONS} - {"bf16"})]
    )
    parser.add_argument("--out", default=str(Path(__file__).parent / "results/cuda_trace.json"))
    arguments = parser.parse_args()
    if torch.version.cuda is None:
        parser.error("this is torch for the CPU; make trace-cuda brings the CUDA build")
    models, steps = [], []
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.models:
            path = Path(directory) / name
            write_zeros(plan_checkpoint(SHAPES[name]), path)
            for precision in arguments.precisions:
                reads = name == arguments.models[0]
                every = precision == arguments.precisions[0]
                loaded, traced = trace_model(path, name, precision, reads=reads, every=every)
                models.append(loaded)
                steps += [asdict(one) for one in traced]
                print(f"{name} {precision}: {len(traced)} steps, {loaded['trace_s']} s")
                for one in traced:
                    print(
                        f"  {one.step:40} {one.launches:5} launches {one.kernels:6} kernels "
                        f"{one.copies} copies {one.waits} wait {one.gigabytes:8.2f} GB"
                    )
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "capability": CAPABILITY,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "models": models,
        "steps": steps,
    }
    lines = {k: [json.dumps(one) for one in report[k]] for k in ("models", "steps")}
    text = json.dumps(report | {k: f"@{k}" for k in lines}, indent=1)
    for key, rows in lines.items():  # a line each
        text = text.replace(f'"@{key}"', "[\n  " + ",\n  ".join(rows) + "\n ]")
    Path(arguments.out).write_text(text + "\n")
    print(json.dumps({"steps": len(steps), "waits_while_queuing": 0, "out": arguments.out}))


if __name__ == "__main__":
    main()
