"""A daemon over checkpoints whose files lie, and over right ones that look odd."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from daemon_process import DaemonProcess
from safetensors.torch import load_file, save_file

from sage_fed.client import Client
from sage_fed.core import Message, Tier, resolve_model

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
