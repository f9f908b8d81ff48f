"""The native kernels: every product against fp32, whole steps against torch, and their build."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_driver import generate
from native_kernels import require_native
from tiny_models import CONFIGS, SHAPE, Checkpoint, prompt_of, save_random
from transformers import Qwen3Config

from sage_fed.core import Sampling
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.engine import precision as numbers
from sage_fed.engine.native import Library, Unavailable
from sage_fed.engine.native import forward as native_forward
from sage_fed.engine.native import library as kernels
from sage_fed.engine.native.forward import Arena, PackedFormat, PackedLinear
from sage_fed.errors import ModelLoadError
from sage_fed.steps import Chunk, Draw

Checkpoints = Callable[[str], Checkpoint]

DRAW = Draw(Sampling(), 0)
KINDS = ("fp32", "bf16", "int8", "int4")
ROWS = (1, 2, 3, 4, 5, 6, 7, 16, 33, 130)
SHAPES = ((1, 2), (64, 32), (131, 48), (33, 7), (256, 896), (100, 1120))

WEIGHT_ERROR = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127 + 1e-6, "int4": 1 / 8}
"""Of a weight, as a share of the largest of its row or group."""

PRODUCT_ERROR = {"fp32": 2e-6, "bf16": 4e-3, "int8": 9e-3, "int4": 9e-3}
"""Of a product with the stored weights, relative in the 2-norm: rounded activations."""


@pytest.fixture(scope="module")
def library() -> Library:
    """The kernels on two threads."""
    return require_native(2)


def packed(library: Library, kind: str, weight: torch.Tensor, bias: torch.Tensor) -> PackedLinear:
    """A layer whose rows arrive in two pieces, the later one first."""
    builder = PackedFormat(library, kind, Arena()).builder(*weight.shape, bias=True)
    half = weight.shape[0] // 3
    builder.place_weight(half, weight[half:])
    builder.place_weight(0, weight[:half])
    builder.place_bias(0, bias)
    return builder.build()


def stored(linear: PackedLinear) -> torch.Tensor:
    return linear.rows(torch.arange(linear.struct.n))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_that_of_the_stored_weights(
    library: Library, kind: str, shape: tuple[int, int]
) -> None:
    """Any number of rows times weights of any shape, within what rounding activations costs."""
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator)
    bias = torch.randn(shape[0], generator=generator)
    linear = packed(library, kind, weight, bias)
    kept = stored(linear)
    largest = weight.abs().amax(-1, keepdim=True)
    assert ((kept - weight).abs() <= WEIGHT_ERROR[kind] * largest * 1.01).all()
    for rows in ROWS:
        x = torch.randn(rows, shape[1], generator=generator)
        expected = (x.double() @ kept.double().T + bias).float()
        error = (linear(x) - expected).norm() / expected.norm()
        assert error < PRODUCT_ERROR[kind], rows


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(library: Library, kind: str) -> None:
    """One thread and two give the same result, however the work was shared out."""
    weight, bias, x = torch.randn(333, 96), torch.randn(333), torch.randn(40, 96)
    expected = packed(require_native(1), kind, weight, bias)(x)
    assert torch.equal(expected, packed(library, kind, weight, bias)(x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantised_weights_are_the_canonical_ones(library: Library, shape: tuple[int, int]) -> None:
    """Numbers and scales are those of `quantise`, to the bit, zero and constant rows included."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    weight[0] = 0.0
    weight[-1, : shape[1] // 2] = -0.25
    bias = torch.zeros(shape[0])
    expected = numbers.dequantise_int8(*numbers.quantise_int8(weight))
    assert torch.equal(expected, stored(packed(library, "int8", weight, bias)))
    expected = numbers.dequantise_int4(*numbers.quantise_int4(weight))[:, : shape[1]]
    assert torch.equal(expected, stored(packed(library, "int4", weight, bias)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_of_any_floating_type_are_packed(library: Library, dtype: torch.dtype) -> None:
    """A checkpoint's own type is converted on the way."""
    weight = torch.randn(70, 40).to(dtype)
    linear = packed(library, "fp32", weight, torch.zeros(70))
    assert torch.equal(weight.float(), stored(linear))


def engine(source: Checkpoint, **changes: object) -> Engine:
    options = {"kv_cache_bytes": 1 << 20, "precision": "bf16", "kernels": "native"} | changes
    return load_engine(EngineOptions(model=str(source.path), **options), lambda _: None)


def logits_of(loaded: Engine, chunks: list[Chunk]) -> torch.Tensor:
    """Logits of the last row of every chunk, from a pass of its own."""
    with torch.inference_mode():
        found = loaded._forward.begin(chunks).advance(None).logits
    assert found is not None
    return found.float().clone()


@pytest.mark.parametrize("name", CONFIGS)
def test_bf16_logits_are_near_those_of_fp32(
    library: Library, checkpoint: Checkpoints, name: str
) -> None:
    """Of every architecture, and no farther from fp32 than torch's own bf16 path (with margin)."""
    del library
    prompt = prompt_of(45)
    expected = checkpoint(name).logits(prompt)[-1]
    chunk = [Chunk(0, 0, prompt, (3, 1, 4), (DRAW,))]
    errors = {
        kernels: (logits_of(engine(checkpoint(name), kernels=kernels), chunk)[0] - expected)
        .norm()
        .item()
        for kernels in ("native", "torch")
    }
    assert errors["native"] < 1.5 * errors["torch"] + 0.01 * expected.norm().item()


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3", "llama3"])
def test_company_and_pieces_change_little_in_bf16(
    library: Library, checkpoint: Checkpoints, name: str
) -> None:
    """A prompt in pieces, beside decoding strangers, has the logits that it has alone."""
    del library
    loaded, prompt, table = engine(checkpoint(name)), prompt_of(70), tuple(range(10, 15))
    alone = logits_of(loaded, [Chunk(0, 0, prompt, table, (DRAW,))])[0]
    strangers = [Chunk(i, 0, prompt_of(5 + i), (20 + i,)) for i in range(5)]
    logits_of(loaded, [*strangers, Chunk(0, 0, prompt, table, (DRAW,))])
    loaded._forward.begin([Chunk(0, 0, prompt[:33], table)]).advance(None)
    company = [Chunk(i, 5 + i, (9 + i,), (20 + i,), (DRAW,)) for i in range(5)]
    together = logits_of(loaded, [*company, Chunk(0, 33, prompt[33:69], table)])
    assert together.shape[0] == 5
    last = logits_of(loaded, [company[0], Chunk(0, 69, prompt[69:], table, (DRAW,))])[1]
    assert (last - alone).norm() < 0.02 * alone.norm()


@pytest.mark.parametrize("name", ["qwen2-untied", "qwen3-biased", "mistral"])
def test_bf16_answers_are_those_of_torch_where_the_choice_is_clear(
    library: Library, checkpoint: Checkpoints, name: str
) -> None:
    """Greedy tokens agree until the two best are closer than rounding can tell."""
    del library
    prompt = prompt_of(40)
    answer = generate(engine(checkpoint(name)), prompt, 20)
    logits = checkpoint(name).logits(prompt + answer)[len(prompt) - 1 : -1]
    best = logits.topk(2).values
    for row, token in enumerate(answer):
        lost = best[row, 0] - logits[row, token]
        assert lost <= 0.05 * logits[row].norm() / logits.shape[1] ** 0.5 * 3, row


def test_a_cache_full_of_nan_is_never_read(library: Library, checkpoint: Checkpoints) -> None:
    """In bf16 too: what lies behind a sequence's newest token does not exist for it."""
    del library
    loaded, prompt = engine(checkpoint("qwen2-tied")), prompt_of(37)
    expected = generate(loaded, prompt, 20)
    with torch.inference_mode():
        loaded._forward._cache.pool.fill_(float("nan"))
    assert expected == generate(loaded, prompt, 20)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied", "qwen3-biased", "llama-biased"])
def test_quantised_logits_are_near_those_of_torch(
    library: Library, checkpoint: Checkpoints, name: str, precision: str
) -> None:
    """The same weights; what differs is how activations are rounded.

    These random models amplify that: torch's own bf16 is up to 0.11 from fp32 in them.
    """
    del library
    chunks = [
        Chunk(0, 0, prompt_of(45), (3, 1, 4), (DRAW,)),
        Chunk(1, 0, prompt_of(9), (2,), (DRAW,)),
    ]
    of = {
        kernels: logits_of(engine(checkpoint(name), precision=precision, kernels=kernels), chunks)
        for kernels in ("native", "torch")
    }
    assert (of["native"] - of["torch"]).norm() < 0.2 * of["torch"].norm()


@pytest.fixture(scope="module", params=[(14, 2, 64), (7, 1, 128), (4, 4, 80), (6, 3, 32)], ids=str)
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model with heads of a real size: query heads, KV heads, elements."""
    heads, kv_heads, head_dim = request.param
    shape = {**SHAPE, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    config = Qwen3Config(**{**shape, "initializer_range": 0.1}, head_dim=head_dim)
    return save_random(config, tmp_path_factory.mktemp("wide") / "model")


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-4), ("bf16", 0.05), ("int8", 0.1)])
def test_attention_over_blocks_of_keys_is_exact(
    wide: Checkpoint, precision: str, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts over several blocks of 64 keys, in pieces, then many sequences that decode.

    On two threads, however little there is to do.
    """
    monkeypatch.setattr(native_forward, "_ALONE_US", 0.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    require_native(2)
    loaded = engine(wide, precision=precision, kv_cache_bytes=1 << 25)
    prompts = [
        prompt_of(length, seed=i) for i, length in enumerate((190, 64, 65, 129, 3, 17, 128, 1, 70))
    ]
    tables = [tuple(range(i * 16, i * 16 + 16)) for i in range(len(prompts))]
    expected = [wide.logits(prompt)[-1] for prompt in prompts]
    whole = [Chunk(i, 0, p, tables[i], (DRAW,)) for i, p in enumerate(prompts)]
    cut = [len(prompt) // 3 for prompt in prompts]
    pieces = [Chunk(i, 0, p[: cut[i]], tables[i]) for i, p in enumerate(prompts) if cut[i]]
    rest = [Chunk(i, cut[i], p[cut[i] :], tables[i], (DRAW,)) for i, p in enumerate(prompts)]
    newest = [Chunk(i, len(p) - 1, p[-1:], tables[i], (DRAW,)) for i, p in enumerate(prompts)]
    for chunks in (whole, newest, rest, newest[:2]):
        if chunks is rest:
            loaded._forward.begin(pieces).advance(None)
        for found, wanted in zip(logits_of(loaded, chunks), expected, strict=False):
            assert (found - wanted).norm() < bound * wanted.norm()


def test_the_best_token_is_that_of_the_logits(library: Library, checkpoint: Checkpoints) -> None:
    """The pass finds each row's argmax on the way."""
    del library
    loaded = engine(checkpoint("llama"))
    chunks = [Chunk(i, 0, prompt_of(3 + i), (i,), (DRAW,)) for i in range(7)]
    with torch.inference_mode():
        forwarded = loaded._forward.begin(chunks).advance(None)
        assert forwarded.logits is not None
        assert torch.equal(forwarded.logits.argmax(-1), forwarded.best)


def test_torch_can_be_asked_for(checkpoint: Checkpoints) -> None:
    """The other kernels are one option away, and a model says whose it runs."""
    assert engine(checkpoint("llama"), kernels="torch").info.kernels == "torch"


def test_what_the_kernels_lack_is_refused_or_left_to_torch(checkpoint: Checkpoints) -> None:
    """fp16 is not theirs: demanded it is an error, otherwise torch does it and says so."""
    assert engine(checkpoint("llama"), precision="fp16", kernels="auto").info.kernels == "torch"
    with pytest.raises(ModelLoadError, match="fp16"):
        engine(checkpoint("llama"), precision="fp16", kernels="native")


def test_a_cpu_without_bf16_instructions_has_the_same_kernels(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for AVX-512 of before 2020: weights round as torch rounds them, sums agree."""
    del library
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(kernels, "_FLAGS", (*kernels._FLAGS, "-mno-avx512bf16"))
    older = require_native(2)
    random = torch.Generator().manual_seed(3)
    # Any bits but those of denormal numbers, and ties, which go to the even neighbour.
    bits = torch.randint(0, 2**31, (64, 96), dtype=torch.int64, generator=random).int()
    weight = bits.view(torch.float32)
    weight = torch.where(weight.abs() > 1e-30, weight, 1.0)
    weight[:, ::5] = torch.tensor(0x3F808000, dtype=torch.int32).view(torch.float32)
    weight[:, 1::5] = torch.tensor(0x3F818000, dtype=torch.int32).view(torch.float32)
    bias = torch.zeros(64)
    numbers = torch.where(weight.isfinite(), weight, torch.nan).bfloat16().float()
    kept = stored(packed(older, "bf16", weight, bias))
    finite = weight.isfinite()
    assert torch.equal(numbers[finite], kept[finite])
    assert torch.equal(weight.isnan(), kept.isnan())
    weight = torch.randn(131, 97, generator=random)
    linear = packed(older, "bf16", weight, torch.zeros(131))
    x = torch.randn(7, 97, generator=random)
    expected = x.double() @ stored(linear).double().T
    error = (linear(x).double() - expected).norm() / expected.norm()
    assert error < PRODUCT_ERROR["bf16"]


@pytest.fixture
def cache(library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, and sources that compile at once."""
    del library
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int one() { return 1; }')
    monkeypatch.setattr(kernels, "_SOURCES", sources)
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    return tmp_path / "kernels"


def test_the_second_build_is_a_find(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once; then found, without a compiler too; a damaged file is compiled again."""
    first = kernels.build_library()
    assert isinstance(first, kernels.Built)
    assert first.compiled
    assert first.path.parent == cache
    assert cache.stat().st_mode & 0o077 == 0
    assert kernels.build_library() == kernels.Built(first.path, compiled=False)
    first.path.write_bytes(first.path.read_bytes()[:-1])
    assert kernels.build_library() == kernels.Built(first.path, compiled=True)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert kernels.build_library() == kernels.Built(first.path, compiled=False)


def test_old_builds_are_forgotten(cache: Path, tmp_path: Path) -> None:
    """Every version of the sources is a library of its own; the newest eight are kept."""
    for version in range(10):
        (tmp_path / "sources" / "one.cpp").write_text(
            f'extern "C" int one() {{ return {version}; }}'
        )
        newest = kernels.build_library()
        assert isinstance(newest, kernels.Built)
    assert newest.path.is_file()
    assert (8, 8) == (len(list(cache.glob("*.so"))), len(list(cache.glob("*.sha256"))))


@pytest.mark.usefixtures("cache")
def test_without_a_compiler_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the cache and no compiler: a reason, not an exception."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    found = kernels.build_library()
    assert isinstance(found, Unavailable)
    assert "no C++ compiler" in found.reason


@pytest.mark.usefixtures("cache")
def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it wrote is the reason."""
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 3\n")
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    found = kernels.build_library()
    assert isinstance(found, Unavailable)
    assert "broken failed with 3: this compiler is broken" in found.reason


def test_a_directory_that_others_may_write_to_is_refused(cache: Path) -> None:
    """Whoever could put a library there could run code as us."""
    cache.mkdir(mode=0o700)
    cache.chmod(0o770)
    found = kernels.build_library()
    assert isinstance(found, Unavailable)
    assert "0700" in found.reason
