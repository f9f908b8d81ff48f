"""What the daemon makes of a tier's settings before it loads anything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sage_fed
from sage_fed.core import TIER_ROLES, Tier
from sage_fed.daemon.build import load_tokenizers, tier_setup
from sage_fed.errors import ConfigError
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
    with pytest.raises(ConfigError) as raised:
        await load_tokenizers(settings(tmp_path, strategic__model="./owner/model"))
    assert f"strategic.model: there is no directory {tmp_path}/owner/model" == str(raised.value)


async def test_a_tiers_settings_reach_its_scheduler(tmp_path: Path) -> None:
    """What the operator says of batches, queues and the cache bounds the tier."""
    flags = {"tactical__prefix_cache": "false", "tactical__kv_overcommit": "2.5"}
    given = settings(tmp_path, tactical__max_batch="3", **flags)
    tokenizers = await load_tokenizers(given)
    chosen, default = (tier_setup(given, tier, tokenizers[tier]) for tier in TIER_ROLES)
    assert (3, False, 2.5) == (chosen.max_batch, chosen.prefix_cache, chosen.kv_overcommit)
    assert (32, True, 1.0) == (default.max_batch, default.prefix_cache, default.kv_overcommit)


async def test_a_quantised_tier_keeps_its_weights_where_it_is_told(tmp_path: Path) -> None:
    """Precision, kernels and the cache of the settings are what the engine is loaded with."""
    place = tmp_path / "kept"
    flags = {"tactical__precision": "int4", "kernels": "torch", "weights_cache": str(place)}
    given = settings(tmp_path, **flags)
    tokenizers = await load_tokenizers(given)
    tactical, strategic = (tier_setup(given, tier, tokenizers[tier]) for tier in TIER_ROLES)
    info = tactical.load(lambda _: None).info
    assert ("int4", "torch") == (info.precision, info.kernels)
    assert 1 == len(list(place.glob("*.safetensors")))
    strategic.load(lambda _: None).close()
    assert 1 == len(list(place.glob("*.safetensors")))


async def test_tiers_with_the_same_tokenizer_share_one(tmp_path: Path) -> None:
    """The bundled pair encodes alike, so each prompt is encoded once."""
    tokenizers = await load_tokenizers(settings(tmp_path))
    assert tokenizers[Tier.TACTICAL] is tokenizers[Tier.STRATEGIC]


def test_the_daemon_does_without_transformers() -> None:
    """Its import is a second of a start, and nothing of the bundled pair needs it."""
    program = "import sage_fed.daemon, sys; sys.exit('transformers' in sys.modules)"

    assert 0 == subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode


async def test_an_end_token_that_only_the_tokenizer_knows_ends_a_text(tmp_path: Path) -> None:
    """A generation configuration that names another token does not let answers run on."""
    bundled = Path(sage_fed.__file__).parent / "models" / "demo-tactical"
    copy = tmp_path / "silent"
    shutil.copytree(bundled, copy)
    for name in ("generation_config.json", "config.json"):
        values = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(values | {"eos_token_id": 497}))
    given = settings(tmp_path, tactical__model=str(copy))
    tokenizers = await load_tokenizers(given)

    engine = tier_setup(given, Tier.TACTICAL, tokenizers[Tier.TACTICAL]).load(lambda _: None)

    assert frozenset({497, 499}) == engine.eos_token_ids


async def test_equal_files_in_two_places_are_read_once(tmp_path: Path) -> None:
    """A tokenizer is the same by what its files say, wherever they are and whatever is beside."""
    bundled = Path(sage_fed.__file__).parent / "models" / "demo-tactical"
    for tier in TIER_ROLES:
        shutil.copytree(bundled, tmp_path / tier.name)
    (tmp_path / "strategic" / "README.md").write_text("a copy")
    given = {f"{tier.name}__model": str(tmp_path / tier.name) for tier in TIER_ROLES}

    tokenizers = await load_tokenizers(settings(tmp_path, **given))

    assert tokenizers[Tier.TACTICAL] is tokenizers[Tier.STRATEGIC]


async def test_tokenizers_that_encode_differently_stay_apart(tmp_path: Path) -> None:
    """Another template is another tokenizer, also where the vocabulary is the same."""
    bundled = Path(sage_fed.__file__).parent / "models" / "demo-tactical"
    shutil.copytree(bundled, tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0].content }}")

    tokenizers = await load_tokenizers(settings(tmp_path, strategic__model=str(tmp_path / "other")))

    assert tokenizers[Tier.TACTICAL] is not tokenizers[Tier.STRATEGIC]
