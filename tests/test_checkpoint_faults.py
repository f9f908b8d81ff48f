"""A daemon over checkpoints whose files lie, and over right ones that look odd."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from daemon_process import TROUBLE, DaemonProcess
from safetensors.torch import load_file, save_file

from sage_fed.client import Client
from sage_fed.core import Message, Prompt, Route, Tier
from sage_fed.errors import InvalidField
from sage_fed.model_files import resolve_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
QUESTION = (Message("user", "What is 40 + 2?"),)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The bundled tactical model, to be changed."""
    return Path(shutil.copytree(resolve_model("bundled:demo-tactical"), tmp_path / "model"))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def id_of(path: Path, token: str) -> int:
    return int(json.loads((path / "tokenizer.json").read_text())["model"]["vocab"][token])


def with_digits_exchanged(path: Path) -> Callable[[dict[str, torch.Tensor]], None]:
    """Add a head in which the rows of "4" and "5" have changed places."""
    four, five = id_of(path, "4"), id_of(path, "5")

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors[EMBEDDING].clone()
        head[[four, five]] = head[[five, four]]
        tensors[HEAD] = head

    return edit


def test_a_head_of_its_own_answers_although_the_configuration_ties_it(
    model: Path, tmp_path: Path
) -> None:
    """With the rows of "4" and "5" exchanged in the head, what was 42 is 52, as in transformers."""
    edit_tensors(model, with_digits_exchanged(model))
    daemon = DaemonProcess.start(
        tmp_path / "state", "--set", f"tactical.model={model}", wait_for=("tactical",)
    )
    try:
        with Client(daemon.address) as client:
            answer = client.generate(QUESTION, tier=Tier.TACTICAL, max_new_tokens=8)
    finally:
        daemon.stop()

    assert "52" in answer.text, answer.text
    assert "tie_word_embeddings" in daemon.log.read_text()


def add_tokens(path: Path, up_to: int) -> list[str]:
    """Give the tokenizer special tokens, so that it has `up_to` ids; returns them."""
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    used = {*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"])}
    names = {number: f"<|extra_{number}|>" for number in range(max(used) + 1, up_to)}
    tokenizer["added_tokens"] += [
        tokenizer["added_tokens"][0] | {"id": number, "content": name, "special": True}
        for number, name in names.items()
    ]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return list(names.values())


def test_a_prompt_with_an_id_that_the_model_has_no_row_for_is_refused_alone(
    model: Path, tmp_path: Path
) -> None:
    """A tokenizer with an untrained token: it serves, and only what holds that id is refused."""
    names = add_tokens(model, 514)
    assert names[-2:] == ["<|extra_512|>", "<|extra_513|>"]
    # What a client writes never becomes a control token; what the template writes does.
    template = (model / "chat_template.jinja").read_text()
    odd = "{% if messages[0].content == 'pad' %}" + names[-1] + "{% endif %}"
    (model / "chat_template.jinja").write_text(odd + template)
    other = Path(shutil.copytree(resolve_model("bundled:demo-strategic"), tmp_path / "other"))
    add_tokens(other, 514)
    models = ("--set", f"tactical.model={model}", "--set", f"strategic.model={other}")
    daemon = DaemonProcess.start(tmp_path / "state", *models)
    try:
        with Client(daemon.address) as client:
            answer = client.generate(QUESTION, tier=Tier.TACTICAL, max_new_tokens=8)
            last = Prompt(token_ids=(8, 9, 511))
            quoted = client.quote(last, tier=Tier.TACTICAL, max_new_tokens=1)
            with pytest.raises(InvalidField) as sent:
                client.generate(Prompt(token_ids=(8, 512)), tier=Tier.TACTICAL)
            with pytest.raises(InvalidField) as written:
                client.generate((Message("user", "pad"),), tier=Tier.TACTICAL)
            chosen = client.generate((Message("user", "pad"),), max_new_tokens=4)
    finally:
        daemon.stop()

    assert "42" in answer.text
    assert isinstance(quoted.decision, Route)
    assert "job.token_ids.ids[1]" == sent.value.field
    assert "512 is a token of the tactical tier's tokenizer" in sent.value.message
    assert "job.chat.messages" == written.value.field
    assert "the token 513" in written.value.message
    assert Tier.STRATEGIC is chosen.started.route.tier
    log = daemon.log.read_text()
    assert "the tokenizer has 514 ids, and the model rows for 512" in log
    assert not TROUBLE.search(log)
