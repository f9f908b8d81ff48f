"""A random-weight checkpoint that every engine here can be fed with, written once.

Owns: its directory and its tokenizer, a stand-in because token ids are fed directly.
Does not know: the engines; what the weights are (`sage_fed.engine.write_checkpoint`).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # the checkout that this file is in, whatever is installed

from sage_fed.engine import SHAPES as REAL_SHAPES  # noqa: E402 - after the path
from sage_fed.engine import plan_checkpoint, write_checkpoint  # noqa: E402
from sage_fed.engine.random_checkpoint import Shape  # noqa: E402

SHAPES: dict[str, Shape] = {
    "qwen2.5-0.5b": REAL_SHAPES["qwen2.5-0.5b"],
    "qwen2.5-1.5b": REAL_SHAPES["qwen2.5-1.5b"],
    "tiny": Shape(128, 2, 2, 1, 256, 1024, tied=True, tokenizer_ids=1024),
}
_TOKENIZER = ROOT / "sage_fed" / "models" / "demo-tactical"


def make(shape: str, folder: Path) -> Path:
    """The checkpoint of `shape` under `folder`; as it is where it is there already."""
    directory = folder / shape
    if not directory.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_checkpoint(
            plan_checkpoint(SHAPES[shape]),
            directory,
            seed=7,
            progress=lambda _: None,
            complete=_add_tokenizer,
        )
    return directory


def _add_tokenizer(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_TOKENIZER / name, directory / name)
