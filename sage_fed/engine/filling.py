"""A model's weights into memory: from what an earlier start has kept, or from the checkpoint.

Owns the choice between the two and the progress of both. Fails with `ModelLoadError`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from sage_fed.engine.cache_directory import default_directory
from sage_fed.engine.checkpoint import stream_weights, weight_files
from sage_fed.engine.weights import ModelWeights, WeightsBuilder
from sage_fed.engine.weights_cache import WeightsCache, cache_key

_READ = 0.8
"""The share of the progress that is reading, where keeping follows it."""

_LOG = logging.getLogger(__name__)


def weights_cache(where: str, max_bytes: int) -> WeightsCache | None:
    """The cache at `where`: a directory, "auto" for the user's own, or "off"."""
    if where == "off":
        return None
    try:
        directory = default_directory("weights") if where == "auto" else Path(where).expanduser()
    except OSError as error:
        _LOG.warning("the weights are not kept for the next start: %s", error)
        return None
    return WeightsCache(directory, max_bytes)


def load_weights(
    make: Callable[[], WeightsBuilder],
    directory: Path,
    device: torch.device,
    cache: WeightsCache | None,
    *,
    made: tuple[object, ...],
    progress: Callable[[float], None],
) -> ModelWeights:
    """Fill and build what `make` allocates; `progress` rises to 1.

    With a `cache` the weights come from there, or go there once they have been read. `made` is
    what `make` depends on beside the files, for the entry's key.

    Raises:
        ModelLoadError: the checkpoint cannot be read.
    """
    rising = _rising(progress)
    builder = make()
    if cache is None:
        stream_weights(directory, builder.places, device, lambda d, t: rising(d / t))
        return builder.build()
    key = cache_key(weight_files(directory), made=made)
    if cache.has(key):
        if cache.read(key, builder.storage, lambda d, t: rising(d / t)):
            _LOG.info("read the weights that an earlier start has kept")
            return builder.build()
        # Freed first: no machine has room for two.
        del builder
        builder = make()
    stream_weights(directory, builder.places, device, lambda d, t: rising(_READ * d / t))
    cache.write(key, builder.storage, lambda d, t: rising(_READ + (1 - _READ) * d / t))
    return builder.build()


def _rising(progress: Callable[[float], None]) -> Callable[[float], None]:
    """Progress that never falls, also where something has to be done again."""
    highest = 0.0

    def report(share: float) -> None:
        nonlocal highest
        highest = max(highest, share)
        progress(highest)

    return report
