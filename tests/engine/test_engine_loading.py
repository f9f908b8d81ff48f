"""What can be loaded, what is refused and how the refusal reads, and what loading reports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_driver import generate
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, SHAPE, Checkpoint, edit_json, prompt_of, save_random
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from sage_fed.core import Sampling
from sage_fed.engine import Engine, EngineOptions, load_engine, locate
from sage_fed.errors import ModelLoadError
from sage_fed.steps import BLOCK_SIZE

Checkpoints = Callable[[str], Checkpoint]

KV_BYTES_PER_TOKEN = 3 * 2 * 2 * 8 * 4  # layers, K and V, KV heads, head_dim, fp32


@pytest.fixture
def copy(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A checkpoint of its own for a test that damages it."""
    return Path(shutil.copytree(checkpoint("llama").path, tmp_path / "damaged"))


def load(path: Path | str, **changes: object) -> Engine:
    options = EngineOptions(model=str(path), kv_cache_bytes=1 << 22)
    return load_engine(replace(options, **changes), lambda _: None)


def refusal(path: Path | str, **changes: object) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(path, **changes)
    return caught.value.message


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    """The message names what it is and what would be supported."""
    config = GPT2Config(architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path)
    text = refusal(tmp_path)
    assert "GPT2LMHeadModel" in text
    for supported in ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "LlamaForCausalLM"):
        assert supported in text


def test_remote_code_is_never_run(copy: Path, tmp_path: Path) -> None:
    """A checkpoint that brings its own configuration code is not given the chance to run it."""
    trace = tmp_path / "it-ran"
    (copy / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    edit_json(copy / "config.json", auto_map={"AutoConfig": "evil.Evil"})
    load(copy)
    assert not trace.exists()
    edit_json(copy / "config.json", model_type="evil")
    assert "config.json" in refusal(copy)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"num_key_value_heads": 4}, "4 KV heads"),
        ({"num_hidden_layers": "three"}, "config.json"),
    ],
)
def test_a_configuration_that_would_run_wrong_is_refused(
    copy: Path, values: dict[str, object], culprit: str
) -> None:
    """Whatever the forward pass cannot do is named, before weights are read."""
    edit_json(copy / "config.json", **values)
    assert culprit in refusal(copy)


def test_a_missing_tensor_is_named(copy: Path) -> None:
    """A checkpoint without one of its tensors does not load."""
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(copy, lambda tensors: tensors.pop(name))
    assert name in refusal(copy)


def test_an_unexpected_tensor_is_named(copy: Path) -> None:
    """A tensor that nothing would use means that the model is another one than it says."""
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(copy, lambda tensors: tensors.update({name: torch.zeros(48)}))
    assert name in refusal(copy)


def test_a_wrong_shape_is_named_with_both_shapes(copy: Path) -> None:
    """The message says which tensor, what it is and what it should be."""
    name = "model.layers.2.self_attn.k_proj.weight"
    edit_tensors(copy, lambda tensors: tensors.update({name: torch.zeros(24, 48)}))
    text = refusal(copy)
    assert name in text
    assert "[24, 48]" in text
    assert "[16, 48]" in text


def test_integers_are_not_taken_for_weights(copy: Path) -> None:
    """Packed or quantised tensors are refused by name and type."""
    name = "model.norm.weight"
    edit_tensors(copy, lambda tensors: tensors.update({name: torch.zeros(48, dtype=torch.int8)}))
    text = refusal(copy)
    assert name in text
    assert "I8" in text


def test_a_pickle_is_never_read(copy: Path) -> None:
    """Pickled weights are refused although torch could load them."""
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    text = refusal(copy)
    assert "pytorch_model.bin" in text
    assert "safetensors" in text
    (copy / "pytorch_model.bin").unlink()
    assert "no model.safetensors" in refusal(copy)


def test_a_truncated_file_is_named(copy: Path) -> None:
    """An interrupted copy is an error that names the file."""
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors" in refusal(copy)


def test_shards_are_read_and_a_missing_one_is_named(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """A sharded checkpoint answers like its single file, and says which shard it lacks."""
    source = checkpoint("llama")
    source.reference.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert source.greedy(prompt_of(9), 10) == generate(load(tmp_path), prompt_of(9), 10)
    shards[1].unlink()
    assert shards[1].name in refusal(tmp_path)


def test_an_index_cannot_reach_outside_its_directory(copy: Path) -> None:
    """File names in an index are plain names."""
    shutil.move(copy / "model.safetensors", copy.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside.safetensors" in refusal(copy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_absent_cuda_fails_the_load(checkpoint: Checkpoints) -> None:
    """CUDA asked for but absent is an error that names the device, never a quiet CPU run."""
    text = refusal(checkpoint("llama").path, device="cuda:0")
    assert "cuda:0" in text


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"device": "cuda:99"}, "cuda:99"),
        ({"device": "meta"}, "meta"),
        ({"device": "gpu"}, "gpu"),
        ({"precision": "int3"}, "int3"),
        ({"max_context_tokens": 257}, "257"),
        ({"max_context_tokens": 0}, "context of 0"),
        ({"num_valid_ids": 0}, "0 ids"),
    ],
)
def test_impossible_options_are_refused(
    checkpoint: Checkpoints, changes: dict[str, object], culprit: str
) -> None:
    """Every option that cannot be honoured is named."""
    assert culprit in refusal(checkpoint("llama").path, **changes)


def test_a_kv_budget_below_one_context_says_what_would_do(checkpoint: Checkpoints) -> None:
    """The bytes in the message are exactly enough, and one byte less is not."""
    path = checkpoint("llama").path
    enough = 256 * KV_BYTES_PER_TOKEN
    text = refusal(path, kv_cache_bytes=enough - 1)
    assert f"{enough} bytes" in text
    assert 256 // BLOCK_SIZE == load(path, kv_cache_bytes=enough).num_blocks


def test_the_budget_bounds_the_pool(checkpoint: Checkpoints) -> None:
    """The pool takes what it was given, in whole blocks, and not a byte more."""
    budget = 300 * KV_BYTES_PER_TOKEN
    engine = load(checkpoint("llama").path, kv_cache_bytes=budget)
    assert 300 // BLOCK_SIZE == engine.num_blocks
    assert engine.num_blocks * BLOCK_SIZE * KV_BYTES_PER_TOKEN == engine.info.kv_cache_bytes
    assert engine.info.kv_cache_bytes <= budget


@pytest.mark.parametrize("config", [MistralConfig, Qwen2Config])
def test_an_active_sliding_window_limits_the_context(
    tmp_path: Path, config: type[MistralConfig | Qwen2Config]
) -> None:
    """A context longer than the window is refused; up to the window, answers are right."""
    extra = {"use_sliding_window": True, "max_window_layers": 1} if config is Qwen2Config else {}
    source = save_random(config(**SHAPE, sliding_window=64, **extra), tmp_path / "windowed")
    text = refusal(source.path)
    assert "64" in text
    engine = load(source.path, max_context_tokens=64)
    assert source.greedy(prompt_of(30), 34) == generate(engine, prompt_of(30), 34)


def test_an_inactive_sliding_window_is_ignored(tmp_path: Path) -> None:
    """Qwen2 checkpoints name a window that they do not use."""
    config = Qwen2Config(**SHAPE, sliding_window=16, use_sliding_window=False)
    assert 256 == load(save_random(config, tmp_path / "m").path).max_context_tokens


def test_redundant_tensors_of_old_checkpoints_are_ignored(
    checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """A saved copy of a tied head and saved rotary frequencies say nothing new.

    A head that differs does (`test_engine_files`).
    """
    source = checkpoint("qwen2-tied")
    path = Path(shutil.copytree(source.path, tmp_path / "old"))
    head = {"lm_head.weight": source.reference.get_input_embeddings().weight.detach().clone()}
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    edit_tensors(path, lambda tensors: tensors.update(head | rotary))
    assert source.greedy(prompt_of(9), 10) == generate(load(path), prompt_of(9), 10)


def test_progress_rises_to_one(checkpoint: Checkpoints) -> None:
    """Shares never fall, start at 0 and are 1 exactly when the engine is there."""
    shares: list[float] = []
    options = EngineOptions(model=str(checkpoint("llama").path), kv_cache_bytes=1 << 22)
    load_engine(options, shares.append)
    assert sorted(shares) == shares
    assert (0.0, 1.0) == (shares[0], shares[-1])
    assert 1 == shares.count(1.0)
    assert len(shares) > 20


def test_a_failed_load_never_reports_one(copy: Path) -> None:
    """Progress cannot say "done" of a model that is not there."""
    edit_tensors(copy, lambda tensors: tensors.pop("model.norm.weight"))
    shares: list[float] = []
    with pytest.raises(ModelLoadError):
        load_engine(EngineOptions(model=str(copy), kv_cache_bytes=1 << 22), shares.append)
    assert 1.0 not in shares


@pytest.mark.parametrize("name", ["qwen2-tied", "llama-biased", "qwen3"])
def test_the_info_counts_what_transformers_counts(checkpoint: Checkpoints, name: str) -> None:
    """Parameters are those of the model; in fp32 each of them is 4 bytes, padding aside."""
    source = checkpoint(name)
    info = load(source.path, name="nice", kernels="torch").info
    assert source.reference.num_parameters() == info.parameters
    assert 4 * info.parameters == info.weight_bytes
    assert ("nice", "fp32", "cpu") == (info.name, info.precision, info.device)
    assert CONFIGS[name].__class__.__name__.removesuffix("Config") in info.architecture


def test_half_precision_weights_are_converted(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """A bf16 checkpoint served in fp32 gives the tokens of the same bf16 values in fp32."""
    source = checkpoint("qwen2-untied")
    path = Path(shutil.copytree(source.path, tmp_path / "half"))
    edit_json(path / "config.json", dtype="bfloat16")
    edit_tensors(path, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    reference = type(source.reference).from_pretrained(path, dtype=torch.float32)
    expected = Checkpoint(path, reference).greedy(prompt_of(20), 20)
    assert expected == generate(load(path), prompt_of(20), 20)


def test_bf16_is_served_in_half_the_memory(checkpoint: Checkpoints) -> None:
    """Precision is an option: 2 bytes a parameter and a KV element."""
    engine = load(
        checkpoint("llama").path, precision="bf16", kv_cache_bytes=1 << 20, kernels="torch"
    )
    assert 2 * engine.info.parameters == engine.info.weight_bytes
    assert (1 << 20) // (BLOCK_SIZE * KV_BYTES_PER_TOKEN // 2) == engine.num_blocks
    assert 20 == len(generate(engine, prompt_of(20), 20))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"do_sample": False, "temperature": 0.7, "top_k": 20}, Sampling()),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1},
            Sampling(temperature=0.7, top_p=0.8, top_k=20, min_p=0.1),
        ),
        # Transformers' own default, which it uses where the file names none.
        ({"do_sample": True}, Sampling(temperature=1.0, top_k=50)),
        ({"do_sample": True, "top_k": None}, Sampling(temperature=1.0, top_k=50)),
        ({"do_sample": True, "top_k": 0}, Sampling(temperature=1.0)),
        ({"repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
    ],
)
def test_generation_defaults_are_the_checkpoints_own(
    copy: Path, values: dict[str, object], expected: Sampling
) -> None:
    """Sampling only where the checkpoint asks for it; a penalty in any case."""
    (copy / "generation_config.json").write_text(json.dumps(values))
    assert expected == load(copy).defaults


def test_without_a_generation_config_a_model_is_greedy(copy: Path) -> None:
    """No file, no sampling; the end of text is then the configuration's."""
    (copy / "generation_config.json").unlink()
    engine = load(copy)
    assert (Sampling(), frozenset({7})) == (engine.defaults, engine.eos_token_ids)


def test_a_list_of_ends_is_read(copy: Path) -> None:
    """Chat models have several; those of both files count, where one forgets a token.

    The generation configuration used to win, as in `transformers`: a checkpoint whose own turn's
    end it does not name then ran on to the limit, and its client paid.
    """
    edit_json(copy / "generation_config.json", eos_token_id=[5, 9])
    assert frozenset({5, 7, 9}) == load(copy).eos_token_ids


def test_what_only_the_tokenizer_ends_a_text_with_ends_it_here(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The union of the three, which the model's description shows; a disagreement is said."""
    edit_json(copy / "generation_config.json", eos_token_id=[5])
    engine = load(copy, end_token_ids=frozenset({5, 11}))
    assert frozenset({5, 7, 11}) == engine.eos_token_ids
    assert (5, 7, 11) == engine.info.end_token_ids
    assert 1 == sum("ends a text with 11, which neither" in line for line in caplog.messages)
    caplog.clear()
    load(copy, end_token_ids=frozenset({7}))
    assert not caplog.messages


def test_impossible_generation_defaults_are_named(copy: Path) -> None:
    """A broken default is found at load, not in the first request."""
    edit_json(copy / "generation_config.json", do_sample=True, top_p=1.5)
    text = refusal(copy)
    assert "top_p" in text
    assert "1.5" in text


def test_a_hub_model_needs_a_pinned_commit() -> None:
    """Branches and tags move, so they are refused, without asking the hub."""
    for revision in ("", "main", "v1.0"):
        with pytest.raises(ModelLoadError, match="commit"):
            locate("someone/some-model", revision)


def test_a_hub_model_comes_from_the_cache_if_it_is_complete(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pinned commit that is there needs no network; an interrupted download is not "there"."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--someone--some-model" / "snapshots" / commit
    shutil.copytree(checkpoint("llama").path, snapshot)
    assert snapshot == locate("someone/some-model", commit)
    info = load("someone/some-model", revision=commit).info
    assert ("someone/some-model", commit) == (info.name, info.revision)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="someone/some-model"):
        locate("someone/some-model", commit)


def test_a_path_that_is_not_there_is_named() -> None:
    """Neither a directory nor a hub id."""
    with pytest.raises(ModelLoadError, match="no/such/place"):
        locate("/no/such/place")


def test_a_closed_engine_holds_nothing(checkpoint: Checkpoints) -> None:
    """After `close` a step is a bug of the caller, not a quiet answer."""
    engine = load(checkpoint("llama").path)
    engine.close()
    with pytest.raises(AssertionError, match="closed"):
        generate(engine, prompt_of(3), 1)


def test_llama_without_head_dim_takes_the_quotient(tmp_path: Path) -> None:
    """Old configurations name no head_dim."""
    source = save_random(LlamaConfig(**SHAPE), tmp_path / "old")
    raw = json.loads((source.path / "config.json").read_text())
    del raw["head_dim"]
    (source.path / "config.json").write_text(json.dumps(raw))
    assert source.greedy(prompt_of(9), 10) == generate(load(source.path), prompt_of(9), 10)
