"""A checkpoint on disk: where it is, which files hold its weights, and their streaming.

Accepts a local directory, or a hub id with the commit it is pinned to. Weights come from
safetensors only: a pickle runs code when it is read. They are read straight into their final
places, some megabytes at a time (`stream`).
Where files contradict each other, what `transformers` makes of them is done here too
(docs/decisions/0029).
Fails with a `ModelLoadError` that names the file or the tensor.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

import torch

from sage_fed.core import resolve_model
from sage_fed.engine.configuration import read_object
from sage_fed.engine.stream import Piece, pieces_of, read_pieces
from sage_fed.engine.tensor_file import DTYPES, Stored, TensorFile
from sage_fed.engine.weights import Place
from sage_fed.errors import ModelLoadError

_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FLOATS = ("BF16", "F16", "F32", "F64")
_RECOMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")  # saved by old versions, and never needed
_NAMES_SHOWN = 3
_COMPARED_BYTES = 8 * 2**20


def locate(model: str | Path, revision: str = "") -> Path:
    """The directory of a checkpoint, downloaded if need be.

    `model` is a directory written as a path, or a hub id (`owner/name`), which needs `revision`,
    a commit; `resolve_model` tells them apart by the text alone.

    Raises:
        ModelLoadError: neither, no pinned revision, or the hub did not deliver.
    """
    try:
        source = resolve_model(model)
    except ValueError as error:
        raise ModelLoadError(f"model {model!r}: {error}") from error
    if isinstance(source, Path):
        if not source.is_dir():
            raise ModelLoadError(f"model {model}: there is no such directory")
        return source
    if not _COMMIT.fullmatch(revision):
        raise ModelLoadError(
            f"model {model}: revision {revision!r} is not a commit (40 hex digits); "
            "a hub model has to be pinned to one, because branches and tags move; "
            f"if it is a directory, write ./{model}"
        )
    # First without the network: a pinned commit that is there has nothing new to tell.
    cached = _snapshot(source, revision, local=True)
    if cached is not None and _defect(cached) is None:
        return cached
    downloaded = _snapshot(source, revision, local=False)
    # Offline, the hub's client hands out what an interrupted download has left.
    defect = "it is not here, and the hub cannot be reached"
    if downloaded is not None:
        if (found := _defect(downloaded)) is None:
            return downloaded
        defect = found
    raise ModelLoadError(f"model {model} at {revision[:12]}: {defect}")


def _snapshot(model: str, revision: str, *, local: bool) -> Path | None:
    """The hub's directory for a commit; None where it is neither cached nor to be had."""
    # Half a second to import, for those who have their models from the hub.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        path = snapshot_download(
            model, revision=revision, allow_patterns=_FILES, local_files_only=local
        )
    except LocalEntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        # Not the error's text: it may hold addresses and tokens.
        raise ModelLoadError(
            f"model {model} at {revision[:12]} could not be downloaded ({type(error).__name__})"
        ) from error
    return Path(path)


def _defect(directory: Path) -> str | None:
    """What a checkpoint's directory lacks; None where all files are there."""
    try:
        weight_files(directory)
    except ModelLoadError as error:
        return error.message
    return None if (directory / "config.json").is_file() else "it has no config.json"


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, all of which exist.

    The single file goes before the index of several, as in `transformers`: an index beside it was
    left by whoever merged the shards.

    Raises:
        ModelLoadError: none, a missing shard, pickled weights only, or weights that another file
            is to change.
    """
    if (directory / _ADAPTER).is_file():
        raise ModelLoadError(
            f"{_ADAPTER}: adapters are not applied; merge it into the weights, and remove the file "
            "where that has been done"
        )
    if (single := directory / _SINGLE).is_file():
        return (single,)
    if (index := directory / _INDEX).is_file():
        return _shards(index)
    for pattern in _PICKLES:
        for pickle in sorted(directory.glob(pattern)):
            raise ModelLoadError(
                f"weights in pickle form only ({pickle.name}), which runs code when it is read; "
                "convert them to safetensors"
            )
    others = sorted(
        str(path.relative_to(directory))
        for pattern in ("*.safetensors", "*.gguf", "*/*.safetensors")
        for path in directory.glob(pattern)
    )
    found = f"; {_some(others)} would not be read by that name" if others else ""
    raise ModelLoadError(f"the checkpoint has no {_SINGLE} and no {_INDEX}{found}")


def left_out(directory: Path) -> str | None:
    """Say which of two sets of weights is not read, where there are two."""
    if (directory / _SINGLE).is_file() and (directory / _INDEX).is_file():
        return f"{_SINGLE} is read, and {_INDEX} beside it is not: remove the one that is stale"
    return None


def shared_table(directory: Path, *, tied: bool) -> str | None:
    """Name the tensor that is both the embedding and the head; None where they are two.

    What `transformers` makes of a configuration that ties them (`tied`) and of the tensors that
    are there: two equal ones are one, two that differ are two, and whichever is alone is both.

    Raises:
        ModelLoadError: a broken file.
    """
    if not tied:
        return None
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(TensorFile(path)) for path in weight_files(directory)]
        embedding, head = (
            next(((file, file.tensors[name]) for file in files if name in file.tensors), None)
            for name in (EMBEDDING, HEAD)
        )
        if embedding is None:
            return HEAD if head is not None else EMBEDDING
        return EMBEDDING if head is None or _are_equal(*embedding, *head) else None


def _are_equal(one: TensorFile, first: Stored, other: TensorFile, second: Stored) -> bool:
    """Compare two tensors by value; reads both, as far as they are equal."""
    if first.shape != second.shape:
        return False
    if not {first.type_name, second.type_name} <= set(_FLOATS):
        return False  # refused by name when they are placed
    types = DTYPES[first.type_name], DTYPES[second.type_name]
    elements, step = torch.Size(first.shape).numel(), _COMPARED_BYTES // 8
    for start in range(0, elements, step):
        count = min(step, elements - start)
        parts = []
        for file, stored, dtype in ((one, first, types[0]), (other, second, types[1])):
            raw = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
            file.read_into(raw.numpy().data, stored.offset + start * dtype.itemsize)
            parts.append(raw.view(dtype))
        if first.type_name != second.type_name:
            parts = [part.double() for part in parts]
        if not torch.equal(*parts):
            return False
    return True


def stream_weights(
    directory: Path,
    places: Mapping[str, Place],
    device: torch.device,
    placed: Callable[[int, int], None],
) -> None:
    """Read every tensor of the checkpoint into its place on `device`.

    `placed` is called with the bytes that have been read and those of all, again and again.
    What the checkpoint lacks or has too much of is found before a weight is read.

    Raises:
        ModelLoadError: a missing, unexpected or doubled tensor, a wrong shape or type, or a
            broken file.
    """
    missing = set(places)
    pieces: list[Piece] = []
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(TensorFile(path)) for path in weight_files(directory)]
        for file in files:
            for name, stored in file.tensors.items():
                if _is_redundant(name, places):
                    continue
                _check(name, stored, places, missing)
                pieces += pieces_of(file, stored, places[name])
                missing.remove(name)
        if missing:
            raise ModelLoadError(f"the checkpoint lacks {_some(missing)}")
        read_pieces(pieces, device, placed)
        for file in files:
            file.check_unchanged()


def _is_redundant(name: str, places: Mapping[str, Place]) -> bool:
    """Whether a tensor that some checkpoints hold says nothing new."""
    # Only a head that was found equal to the embedding has no place of its own (`shared_table`).
    equal_head = name == HEAD and name not in places
    return equal_head or _RECOMPUTED.search(name) is not None


def _check(
    name: str, stored: Stored, places: Mapping[str, Place], missing: AbstractSet[str]
) -> None:
    place = places.get(name)
    if place is None:
        raise ModelLoadError(
            f"the checkpoint holds {name}, for which the architecture has no place"
        )
    if name not in missing:
        raise ModelLoadError(f"the checkpoint holds {name} twice")
    if stored.shape != place.shape:
        raise ModelLoadError(f"{name} has shape {list(stored.shape)}, not {list(place.shape)}")
    if stored.type_name not in _FLOATS:
        raise ModelLoadError(
            f"{name} is of type {stored.type_name}; the engine reads {', '.join(_FLOATS)}"
        )


def _shards(index: Path) -> tuple[Path, ...]:
    raw = read_object(index)
    try:
        names = sorted(set(raw["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index.name} cannot be used: {error!r}") from error
    for name in names:
        # A plain name: an index must not reach outside its own directory.
        if name != Path(name).name or not name.endswith(".safetensors"):
            raise ModelLoadError(f"{index.name} names {name!r}, which is no safetensors file here")
        if not (index.parent / name).is_file():
            raise ModelLoadError(f"the checkpoint lacks the file {name}")
    return tuple(index.parent / name for name in names)


def _some(names: Iterable[str]) -> str:
    """A few of `names`, and how many more there are."""
    listed = sorted(names)
    more = len(listed) - _NAMES_SHOWN
    return ", ".join(listed[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
