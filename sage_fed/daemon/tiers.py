"""From settings to what the executor loads and the planner encodes with.

Owns the translation of one tier's settings into engine options. Fails with `ModelLoadError`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from sage_fed.core import Tier
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.errors import ModelLoadError
from sage_fed.executor import TierSetup
from sage_fed.settings import Settings, TierSettings, resolve_model
from sage_fed.text import Tokenizer


async def load_tokenizers(settings: Settings) -> dict[Tier, Tokenizer]:
    """Load each tier's tokenizer, in a thread; equal ones are one object, so they work once.

    Raises:
        ModelLoadError: a checkpoint without a usable tokenizer.
    """
    tokenizers: dict[Tier, Tokenizer] = {}
    for tier in Tier:
        tokenizer = await asyncio.to_thread(
            Tokenizer.load, _source(settings, tier), revision=settings.tier(tier).revision
        )
        equal = (known for known in tokenizers.values() if known.encodes_like(tokenizer))
        tokenizers[tier] = next(equal, tokenizer)
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
        kernels=settings.kernels,
    )

    def load(progress: Callable[[float], None]) -> Engine:
        return load_engine(options, progress)

    return TierSetup(
        load=load,
        max_batch=own.max_batch,
        max_waiting=own.max_waiting,
        prefill_chunk_tokens=own.prefill_chunk_tokens,
        prefix_cache=own.prefix_cache,
    )


def display_name(tier: TierSettings) -> str:
    """Return what clients see: the hub id, or a directory's last part; never a path."""
    source = resolve_model(tier.model)
    return source.name if isinstance(source, Path) else source


def _source(settings: Settings, tier: Tier) -> str | Path:
    """Return where a tier's files are: an absolute directory that is there, or a hub id.

    Raises:
        ModelLoadError: there is no such directory; the hub is not asked for a mistyped path.
    """
    source = resolve_model(settings.tier(tier).model)
    if isinstance(source, Path):
        source = source.absolute()
        if not source.is_dir():
            raise ModelLoadError(f"{tier.value}.model: there is no directory {source}")
    return source
