"""The bundled pair: loads without remote code, stands in the stated relation, and answers."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import FAMILIES, Task, generate, is_correct
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import sage_fed

MODELS = Path(sage_fed.__file__).parent / "models"
TIERS = ("tactical", "strategic")
FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
# Grades and a floor, some points below what the model card reports for them.
FLOORS = [("tactical", (1, 2), 0.72), ("strategic", (1, 2), 0.72), ("strategic", (3, 4), 0.6)]
CAPITALS_AND_DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


@dataclass(frozen=True, slots=True)
class Loaded:
    """One tier of the pair."""

    tokenizer: Tokenizer
    model: PreTrainedModel


@cache
def _load(tier: str) -> Loaded:
    folder = MODELS / f"demo-{tier}"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return Loaded(tokenizer, model.eval())


def _greedy(loaded: Loaded, tasks: list[Task]) -> list[str]:
    prompts = [
        loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": task.prompt}], add_generation_prompt=True, tokenize=False
        )
        for task in tasks
    ]
    batch = loaded.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.inference_mode():
        output = loaded.model.generate(**batch, max_new_tokens=16, do_sample=False)
    replies = output[:, batch["input_ids"].shape[1] :]
    return list(loaded.tokenizer.batch_decode(replies, skip_special_tokens=True))


@pytest.mark.parametrize("tier", TIERS)
def test_ships_the_hugging_face_layout(tier: str) -> None:
    """Each folder holds exactly the files that the loaders read, all of them readable by anyone."""
    files = list((MODELS / f"demo-{tier}").iterdir())
    assert {path.name for path in files} == FILES
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_together_they_stay_small() -> None:
    """Both models together weigh at most 16 MB: they travel in the package and in every clone."""
    num_bytes = sum(
        path.stat().st_size for tier in TIERS for path in (MODELS / f"demo-{tier}").iterdir()
    )
    assert num_bytes <= 16_000_000


def test_the_size_relation_is_that_of_the_real_pair() -> None:
    """The strategic model has about 14 times the tactical one's parameters."""
    tactical, strategic = (_load(tier).model.num_parameters() for tier in TIERS)
    assert 13.5 <= strategic / tactical <= 14.5


def test_one_tokenizer_two_padded_vocabularies() -> None:
    """Equal tokenizers, unequal logit widths, and room for every token in both."""
    tactical, strategic = (_load(tier) for tier in TIERS)
    assert tactical.tokenizer.get_vocab() == strategic.tokenizer.get_vocab()
    assert tactical.model.config.vocab_size != strategic.model.config.vocab_size
    assert len(tactical.tokenizer) < tactical.model.config.vocab_size


@pytest.mark.parametrize("tier", TIERS)
def test_config_is_plain_qwen2(tier: str) -> None:
    """The architecture, stored precision and stop tokens are those that the loaders expect."""
    loaded = _load(tier)
    config = loaded.model.config
    end = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.eos_token_id == end == loaded.tokenizer.eos_token_id
    assert loaded.model.generation_config.eos_token_id[0] == end
    assert config.max_position_embeddings == 2048


@given(text=st.text(max_size=60))
@settings(max_examples=2 * settings.default.max_examples)
def test_any_text_round_trips_in_normal_form_c(text: str) -> None:
    """Every byte has a token, so nothing is lost but the normal form, which Qwen2 sets too."""
    tokenizer = _load("tactical").tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert unicodedata.normalize("NFC", text) == tokenizer.decode(ids)


@given(word=st.text(CAPITALS_AND_DIGITS, min_size=1, max_size=20), around=st.sampled_from("{} ,x"))
def test_capitals_and_digits_are_single_tokens(word: str, around: str) -> None:
    """Operands look the same to the model wherever they stand."""
    tokens = _load("tactical").tokenizer.tokenize(f"{around}{word}{around}")
    assert list(word) == [token for token in tokens if token in CAPITALS_AND_DIGITS]


@pytest.mark.parametrize("tier", TIERS)
def test_the_chat_template_is_chatml(tier: str) -> None:
    """System turns are optional, and the generation prompt opens the assistant's turn."""
    tokenizer = _load(tier).tokenizer
    user = {"role": "user", "content": "Reverse ABC."}
    asked = "<|im_start|>user\nReverse ABC.<|im_end|>\n<|im_start|>assistant\n"
    assert asked == tokenizer.apply_chat_template(
        [user], add_generation_prompt=True, tokenize=False
    )
    system = {"role": "system", "content": "Be brief."}
    assert f"<|im_start|>system\nBe brief.<|im_end|>\n{asked}" == tokenizer.apply_chat_template(
        [system, user], add_generation_prompt=True, tokenize=False
    )


@pytest.mark.parametrize(("tier", "grades", "floor"), FLOORS)
def test_answers_test_questions(tier: str, grades: tuple[int, ...], floor: float) -> None:
    """On a fixed sample of test questions each tier stays above what garbage could reach."""
    assert _accuracy(tier, grades) >= floor


def test_the_strategic_model_is_better_on_hard_questions() -> None:
    """On the fixed sample of the two hardest grades it leads by several points."""
    assert _accuracy("strategic", (3, 4)) >= _accuracy("tactical", (3, 4)) + 0.05


@cache
def _accuracy(tier: str, grades: tuple[int, ...]) -> float:
    """The share of right answers on a fixed sample of test questions."""
    rng = Random(0)
    tasks = [
        generate(rng, family, grade, "test")
        for family in FAMILIES
        for grade in grades
        for _ in range(5)
    ]
    replies = _greedy(_load(tier), tasks)
    return sum(map(is_correct, tasks, replies)) / len(tasks)
