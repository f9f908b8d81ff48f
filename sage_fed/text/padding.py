"""A tokenizer with as many ids as a real one, made from a small one.

Owns the invented tokens. A model computes logits for the ids that its tokenizer has, so a small
tokenizer on a real shape would leave most of the head out, and a speed test would be too good.
The invented tokens are words such as " t1234": every id that such a model draws is text, and
none is ever the encoding of a prompt, because no merge leads to it.
Fails with `OSError` or `ValueError` for a source that is no byte-level `tokenizer.json`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

_FILE = "tokenizer.json"
_COPIED = ("tokenizer_config.json", "chat_template.jinja")
_SPACE = "\u0120"  # how byte-level vocabularies spell it


def write_padded_tokenizer(source: Path, directory: Path, num_ids: int) -> None:
    """Write the tokenizer of `source` to `directory`, with ids up to `num_ids`.

    Raises:
        ValueError: the tokenizer has more ids than that already.
    """
    tokenizer = json.loads((source / _FILE).read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    added = [token["id"] for token in tokenizer["added_tokens"]]
    first = max(*vocabulary.values(), *added) + 1
    if first > num_ids:
        raise ValueError(f"the tokenizer has {first} ids, more than {num_ids}")
    vocabulary |= {f"{_SPACE}t{number}": number for number in range(first, num_ids)}
    text = json.dumps(tokenizer, ensure_ascii=False)
    (directory / _FILE).write_text(text, encoding="utf-8")
    for name in _COPIED:
        shutil.copy(source / name, directory / name)
