"""Files that contradict each other, and files that are not what their name says.

What `transformers` makes of a checkpoint is the reference; the log says where files disagree.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_driver import generate
from native_kernels import require_native
from safetensors.torch import load_file, save_file
from tiny_models import Checkpoint, edit_json, prompt_of
from transformers import AutoModelForCausalLM

from sage_fed.core import Sampling
from sage_fed.engine import Engine, EngineOptions, load_engine, locate
from sage_fed.errors import ModelLoadError

Checkpoints = Callable[[str], Checkpoint]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"
PROMPT = prompt_of(12)


def load(path: Path | str, **changes: object) -> Engine:
    options = {"kv_cache_bytes": 1 << 22, **changes}
    return load_engine(EngineOptions(model=str(path), **options), lambda _: None)  # type: ignore[arg-type]


def refusal(path: Path | str, **changes: object) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(path, **changes)
    return caught.value.message


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def by_transformers(path: Path) -> Checkpoint:
    """What it loads from these files now."""
    return Checkpoint(path, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())


@pytest.fixture
def copy(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen2-tied").path, tmp_path / "copy"))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What was warned of so far by the engine."""
    caplog.set_level(logging.WARNING, "sage_fed.engine")

    def texts() -> str:
        ours = (r for r in caplog.records if r.name.startswith("sage_fed.engine"))
        return "\n".join(record.getMessage() for record in ours if "kernels" not in record.msg)

    return texts


# What is stored of the embedding (E) and the head (H): (E, H) or None where it is not.
STORED: dict[str, tuple[bool, str | None]] = {
    "both, equal": (True, "equal"),
    "both, different": (True, "other"),
    "embedding alone": (True, None),
    "head alone": (False, "other"),
    "neither": (False, None),
}


def store(path: Path, which: str, *, tied: bool | None) -> None:
    """Rewrite a checkpoint so that it stores `which`, and its configuration says `tied`."""
    has_embedding, head = STORED[which]

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors[EMBEDDING]
        if head is not None:
            tensors[HEAD] = embedding.clone() if head == "equal" else embedding.flip(0).contiguous()
        if not has_embedding:
            del tensors[EMBEDDING]

    edit_tensors(path, edit)
    raw = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": tied}
    if tied is None:
        del raw["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize(
    ("which", "remark"),
    [
        ("both, equal", ""),
        ("both, different", "two that differ; both are used"),
        ("embedding alone", ""),
        ("head alone", f"the weights hold no {EMBEDDING}"),
    ],
)
def test_tied_weights_are_what_transformers_makes_of_them(
    copy: Path, which: str, remark: str, kernels: str, said: Callable[[], str]
) -> None:
    """Tied and stored twice alike: one; twice and different: two; once: that one is both."""
    if kernels == "native":
        require_native()
    store(copy, which, tied=True)
    reference = by_transformers(copy)
    shared = (
        reference.reference.get_input_embeddings().weight
        is reference.reference.get_output_embeddings().weight
    )
    assert (which != "both, different") == shared, "transformers reads these files differently now"

    engine = load(copy, kernels=kernels)

    assert reference.greedy(PROMPT, 20) == generate(engine, PROMPT, 20)
    assert reference.reference.num_parameters() == engine.info.parameters
    assert remark in said()
    assert bool(remark) == bool(said())


@pytest.mark.parametrize("tied", [False, None])
@pytest.mark.parametrize("which", ["both, equal", "both, different"])
def test_weights_that_nothing_ties_are_two(
    copy: Path, which: str, tied: bool | None, said: Callable[[], str]
) -> None:
    """False and silence are the same; both tensors are used, and nothing is to be said."""
    store(copy, which, tied=tied)
    reference = by_transformers(copy)

    assert reference.greedy(PROMPT, 20) == generate(load(copy), PROMPT, 20)
    assert said() == ""


@pytest.mark.parametrize(
    ("which", "tied", "lacking"),
    [
        ("embedding alone", False, HEAD),
        ("embedding alone", None, HEAD),
        ("head alone", False, EMBEDDING),
        ("neither", False, f"{HEAD}, {EMBEDDING}"),
        ("neither", True, EMBEDDING),
    ],
)
def test_what_transformers_would_invent_is_refused_by_name(
    copy: Path, which: str, tied: bool | None, lacking: str
) -> None:
    """It fills a missing head with random numbers and warns; a model is not served so."""
    store(copy, which, tied=tied)

    assert f"the checkpoint lacks {lacking}" in refusal(copy)


def test_types_that_differ_are_compared_by_value(copy: Path, said: Callable[[], str]) -> None:
    """A head stored in another type is the embedding's equal where its numbers are."""
    store(copy, "both, equal", tied=True)
    edit_tensors(copy, lambda t: t.update({EMBEDDING: t[EMBEDDING].bfloat16()}))
    edit_tensors(copy, lambda t: t.update({HEAD: t[EMBEDDING].float()}))
    count = by_transformers(copy).reference.num_parameters()

    assert count == load(copy).info.parameters
    assert said() == ""
    edit_tensors(copy, lambda t: t.update({HEAD: t[HEAD] + 2**-20}))
    assert count + 131 * 48 == load(copy).info.parameters
    assert "two that differ" in said()


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_kept_weights_are_told_apart_by_what_is_tied(
    copy: Path, tmp_path: Path, precision: str, kernels: str, said: Callable[[], str]
) -> None:
    """The same files under another `tie_word_embeddings` are another entry of the cache."""
    if kernels == "native":
        require_native()
    store(copy, "both, equal", tied=True)
    where = {"weights_cache": str(tmp_path / "kept"), "precision": precision, "kernels": kernels}
    sizes = []
    for tied in (True, False, True, False):
        edit_json(copy / "config.json", tie_word_embeddings=tied)
        fresh = load(copy, precision=precision, kernels=kernels)
        kept = load(copy, **where)
        assert generate(fresh, PROMPT, 12) == generate(kept, PROMPT, 12)
        sizes.append(kept.info.weight_bytes)

    assert sizes[0] < sizes[1]
    assert sizes[:2] == sizes[2:]
    assert 2 == len(list((tmp_path / "kept").glob("*.safetensors")))
    assert said() == ""


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_two_tables_are_two_in_every_precision(
    copy: Path, checkpoint: Checkpoints, precision: str
) -> None:
    """Tied by the configuration and different in the file is served as an untied model is."""
    store(copy, "both, different", tied=True)
    answer = generate(load(copy, precision=precision), PROMPT, 12)
    edit_json(copy / "config.json", tie_word_embeddings=False)

    assert generate(load(copy, precision=precision), PROMPT, 12) == answer
    tied = generate(load(checkpoint("qwen2-tied").path, precision=precision), PROMPT, 12)
    assert tied != answer


@pytest.fixture
def two_sets(checkpoint: Checkpoints, copy: Path) -> tuple[Path, Path]:
    """A merged checkpoint beside the shards, and the index, of an older state of it."""
    old = checkpoint("qwen2-tied").reference
    old.save_pretrained(copy / "shards", max_shard_size="40KB")
    edit_tensors(copy, lambda t: t.update({EMBEDDING: t[EMBEDDING].flip(0).contiguous()}))
    for path in sorted((copy / "shards").glob("*")):
        if path.name.startswith("model"):
            shutil.move(path, copy / path.name)
    shutil.rmtree(copy / "shards")
    return copy, sorted(copy.glob("model-*.safetensors"))[1]


def test_a_single_file_goes_before_an_index(
    two_sets: tuple[Path, Path], said: Callable[[], str]
) -> None:
    """As in transformers; the log says which of the two was left out."""
    path, shard = two_sets
    reference = by_transformers(path)

    assert reference.greedy(PROMPT, 20) == generate(load(path), PROMPT, 20)
    assert f"model.safetensors is read, and {INDEX} beside it is not" in said()
    shard.unlink()
    assert reference.greedy(PROMPT, 20) == generate(load(path), PROMPT, 20)


def test_an_index_is_read_where_it_is_alone(two_sets: tuple[Path, Path]) -> None:
    """Without the single file the shards are the checkpoint."""
    path, shard = two_sets
    (path / "model.safetensors").unlink()
    assert by_transformers(path).greedy(PROMPT, 20) == generate(load(path), PROMPT, 20)
    shard.unlink()
    assert f"lacks the file {shard.name}" in refusal(path)


@pytest.mark.parametrize(
    "name",
    ["consolidated.safetensors", "model.fp16.safetensors", "m.gguf", "original/x.safetensors"],
)
def test_weights_by_another_name_are_named(copy: Path, name: str) -> None:
    """No other file is taken for the weights, and the refusal says what was found."""
    (copy / "original").mkdir()
    shutil.move(copy / "model.safetensors", copy / name)

    text = refusal(copy)

    assert "no model.safetensors" in text
    assert name in text


def test_an_adapter_beside_the_weights_is_refused(copy: Path) -> None:
    """Transformers would apply it: the weights alone are another model."""
    (copy / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in refusal(copy)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
IMPOSTORS = [
    (LFS, "is a Git LFS pointer", "git lfs pull"),
    (PAGE, "is a web page", "fetch it again"),
    (b"", "is empty", "fetch it again"),
    (b"\0" * 4096, "zeros only", "fetch it again"),
]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", INDEX]
)
@pytest.mark.parametrize(
    ("content", "what", "advice"), IMPOSTORS, ids=["pointer", "page", "empty", "zeros"]
)
def test_a_file_that_is_something_else_is_named_as_that(
    copy: Path, name: str, content: bytes, what: str, advice: str
) -> None:
    """A pointer, a page or nothing: the refusal says the file, what it is and what to do."""
    if name == INDEX:
        (copy / "model.safetensors").unlink()
    (copy / name).write_bytes(content)

    text = refusal(copy)

    assert f"{name} {what}" in text.replace("begins with zeros", "zeros")
    assert advice in text


def test_a_shard_that_is_a_pointer_is_named(two_sets: tuple[Path, Path]) -> None:
    """A clone that was interrupted has some of its shards."""
    path, shard = two_sets
    (path / "model.safetensors").unlink()
    shard.write_bytes(LFS)
    assert f"{shard.name} is a Git LFS pointer" in refusal(path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"error": "Repository not found"}', "JSON text"),
        (b"GGUF\x03\0\0\0" + b"\0" * 64, "a GGUF file"),
        (b"PK\x03\x04" + b"\0" * 64, "pickle"),
    ],
    ids=["json", "gguf", "zip"],
)
def test_weights_of_another_format_are_named(copy: Path, content: bytes, what: str) -> None:
    """A renamed file is known by its first bytes."""
    (copy / "model.safetensors").write_bytes(content)
    assert what in refusal(copy)


def test_a_file_that_was_cut_says_how_much_is_missing(copy: Path) -> None:
    """What an interrupted download has left; one that is too long is no such thing."""
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    assert f"1,000 of its {len(whole):,} bytes are missing" in refusal(copy)
    path.write_bytes(whole + b"\0")
    assert f"has {len(whole) + 1:,} bytes" in refusal(copy)


def test_a_hub_shaped_name_is_never_a_directory(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name in the working directory does not answer for the pinned commit."""
    here = tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct"
    shutil.copytree(checkpoint("qwen2-tied").path, here)
    shutil.copytree(here, tmp_path / "bare")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = "Qwen/Qwen2.5-0.5B-Instruct"

    with pytest.raises(ModelLoadError, match="the hub cannot be reached"):
        locate(name, "0123456789" * 4)
    with pytest.raises(ModelLoadError, match=f"if it is a directory, write ./{name}"):
        locate(name)
    with pytest.raises(ModelLoadError, match=r"if it is a directory, write \./bare"):
        locate("bare")
    assert Path(name) == locate(f"./{name}")
    assert "Qwen2.5-0.5B-Instruct" == load(f"./{name}").info.name
    assert here == locate(str(here)) == locate(here)
    assert "../" in refusal("../nowhere")


def test_a_tokenizer_with_more_ids_than_rows_is_served(
    checkpoint: Checkpoints, said: Callable[[], str]
) -> None:
    """As in transformers, which fails only where such an id is fed; here that is refused before."""
    for name in ("qwen2-tied", "qwen2-untied"):
        source = checkpoint(name)
        engine = load(source.path, num_valid_ids=140)
        assert 131 == engine.num_ids
        assert source.greedy(PROMPT, 20) == generate(engine, PROMPT, 20)
        assert "140 ids, and the model rows for 131" in said()
        assert "from 131 to 139" in said()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("name", ["qwen2-tied", "llama"])
def test_ids_without_a_meaning_are_never_drawn(
    checkpoint: Checkpoints, name: str, kernels: str, precision: str
) -> None:
    """Rows that pad the vocabulary and ids that the tokenizer skips: greedy, drawn or counted."""
    if kernels == "native":
        require_native()
    source = checkpoint(name)
    asked = {"kernels": kernels, "precision": precision}
    free = load(source.path, **asked)
    wanted = [generate(free, prompt_of(9, seed), 12) for seed in range(4)]
    skipped = tuple(sorted({token for answer in wanted for token in answer if token < 120}))
    engine = load(source.path, **asked, num_valid_ids=120, unknown_ids=skipped)
    meaningless = {*skipped, *range(120, 131)}

    for seed, before in enumerate(wanted):
        prompt = prompt_of(9, seed)
        prompt = tuple(token if token < 120 else 8 for token in prompt)
        greedy = generate(engine, prompt, 12)
        hot = generate(engine, prompt, 40, Sampling(temperature=100.0, seed=seed))
        assert not meaningless & {*greedy, *hot}
        assert meaningless & set(before)
        if precision == "fp32":
            assert greedy == _suppressed(source, prompt, meaningless)


def _suppressed(source: Checkpoint, prompt: tuple[int, ...], ids: set[int]) -> tuple[int, ...]:
    """What transformers answers that is forbidden these ids."""
    tensor = torch.tensor([prompt])
    answer = source.reference.generate(
        tensor,
        attention_mask=torch.ones_like(tensor),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=sorted(ids),
    )
    return tuple(answer[0, len(prompt) :].tolist())


def test_ways_to_generate_that_are_not_followed_are_said(
    copy: Path, said: Callable[[], str]
) -> None:
    """What the checkpoint's maker wanted, and the engine does not have; neutral values are not."""
    edit_json(copy / "generation_config.json", num_beams=1, no_repeat_ngram_size=3, typical_p=0.9)

    load(copy)

    assert "no_repeat_ngram_size is set" in said()
    assert "typical_p is set" in said()
    assert "num_beams" not in said()
