"""What the daemon makes of a tier's settings before it loads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage_fed.core import Tier
from sage_fed.daemon.tiers import load_tokenizers
from sage_fed.errors import ModelLoadError
from sage_fed.settings import Settings, load_settings


def settings(tmp_path: Path, **flags: str) -> Settings:
    dotted = {key.replace("__", "."): value for key, value in flags.items()}
    return load_settings(
        {"profile": "demo", "state_dir": str(tmp_path), **dotted}, {}, None
    ).settings


async def test_a_mistyped_relative_directory_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the tier and the whole path, at once and without asking the hub."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError) as raised:
        await load_tokenizers(settings(tmp_path, strategic__model="./owner/model"))
    assert f"strategic.model: there is no directory {tmp_path}/owner/model" == str(raised.value)


async def test_tiers_with_the_same_tokenizer_share_one(tmp_path: Path) -> None:
    """The bundled pair encodes alike, so each prompt is encoded once."""
    tokenizers = await load_tokenizers(settings(tmp_path))
    assert tokenizers[Tier.TACTICAL] is tokenizers[Tier.STRATEGIC]
