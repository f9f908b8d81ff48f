"""From settings to what the executor loads and the planner encodes with.

Owns the translation of one tier's settings into engine options. Fails with `ModelLoadError`, and
with `ConfigError` for a directory that is not there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from sage_fed.core import TIER_ROLES, Tier, resolve_model
from sage_fed.device import TierSetup
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.errors import ConfigError
from sage_fed.settings import Settings, TierSettings
from sage_fed.text import Tokenizer, fingerprint, locate_tokenizer


async def load_tokenizers(settings: Settings) -> dict[Tier, Tokenizer]:
    """Load each tier's tokenizer, in a thread; equal ones are one object, so they work once.

    Raises:
        ConfigError: a directory that is not there.
        ModelLoadError: a checkpoint without a usable tokenizer.
    """
    return await asyncio.to_thread(_load_tokenizers, settings)


def _load_tokenizers(settings: Settings) -> dict[Tier, Tokenizer]:
    tokenizers: dict[Tier, Tokenizer] = {}
    by_files: dict[bytes, Tokenizer] = {}
    for tier in TIER_ROLES:
        directory = locate_tokenizer(_source(settings, tier), settings.tier(tier).revision)
        # A pair's files are mostly equal: a large vocabulary takes half a second to read.
        seen = fingerprint(directory)
        tokenizer = by_files.get(seen) if seen else None
        if tokenizer is None:
            tokenizer = Tokenizer.load(directory)
            equal = (known for known in tokenizers.values() if known.encodes_like(tokenizer))
            tokenizer = next(equal, tokenizer)
        if seen:
            by_files[seen] = tokenizer
        tokenizers[tier] = tokenizer
    return tokenizers


def tier_setup(settings: Settings, tier: Tier, tokenizer: Tokenizer) -> TierSetup:
    """Return how the executor gets this tier's engine, and how much it may take on."""
    own = settings.tier(tier)
    options = EngineOptions(
        model=str(_source(settings, tier)),
        kv_cache_bytes=own.kv_cache_bytes,
        device=settings.device,
        precision=own.precision,
        revision=own.revision or "",
        name=display_name(own),
        max_context_tokens=own.max_context_tokens,
        num_valid_ids=tokenizer.num_valid_ids,
        unknown_ids=tokenizer.unknown_ids,
        end_token_ids=tokenizer.end_token_ids,
        kernels=settings.kernels,
        weights_cache=settings.weights_cache,
        weights_cache_bytes=settings.weights_cache_bytes,
        max_batch=own.max_batch,
    )

    def load(progress: Callable[[float], None]) -> Engine:
        return load_engine(options, progress)

    return TierSetup(
        load=load,
        max_batch=own.max_batch,
        max_waiting=own.max_waiting,
        prefill_chunk_tokens=own.prefill_chunk_tokens,
        prefix_cache=own.prefix_cache,
        kv_overcommit=own.kv_overcommit,
    )


def display_name(tier: TierSettings) -> str:
    """Return what clients see: the hub id, or a directory's last part; never a path."""
    source = resolve_model(tier.model)
    return source.name if isinstance(source, Path) else source


def _source(settings: Settings, tier: Tier) -> str | Path:
    """Return where a tier's files are: an absolute directory that is there, or a hub id.

    Raises:
        ConfigError: there is no such directory; the hub is not asked for a mistyped path.
    """
    source = resolve_model(settings.tier(tier).model)
    if isinstance(source, Path):
        source = source.absolute()
        if not source.is_dir():
            raise ConfigError(f"{tier.name}.model: there is no directory {source}")
    return source
