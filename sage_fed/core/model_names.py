"""How a model is named: a directory, a bundled model, or a repository of the hub with a commit.

Owns the one rule that tells them apart. It looks at the text alone: `Qwen/Qwen2.5-7B` is the hub's
wherever the daemon runs, also where the working directory has a folder of that name, because a
revision is pinned for the one and says nothing of the other.
Knows no file; whether one is there is found out at load. Fails with `ValueError`.
"""

from __future__ import annotations

import re
from pathlib import Path

BUNDLED_PREFIX = "bundled:"

_PACKAGE = Path(__file__).parent.parent
_PATHS = ("/", "./", "../", "~")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_BUNDLED_NAME = re.compile(r"[a-z0-9][a-z0-9-]*", re.ASCII)


def resolve_model(name: str | Path) -> Path | str:
    """Where a model's files are: a directory (`Path`) or a hub id (`str`).

    `bundled:NAME` is the directory `models/NAME` of the installed package; text that starts
    with `/`, `./`, `../` or `~`, or is `.` or `..`, is a directory; `OWNER/NAME` is a hub id.
    A `Path` is a directory already.

    Raises:
        ValueError: none of the three; the text says how each is written.
    """
    if isinstance(name, Path):
        return name.expanduser()
    if name.startswith(BUNDLED_PREFIX):
        bundled = name.removeprefix(BUNDLED_PREFIX)
        if _BUNDLED_NAME.fullmatch(bundled):
            return _PACKAGE / "models" / bundled
    elif name.startswith(_PATHS) or name in {".", ".."}:
        try:
            return Path(name).expanduser()
        except RuntimeError as error:
            raise ValueError(f"{name} names no user's home: {error}") from None
    elif _HUB_ID.fullmatch(name):
        return name
    written = f"; if it is a directory, write ./{name}" if name and "\0" not in name else ""
    raise ValueError(
        "expected a hub id (Qwen/Qwen2.5-0.5B-Instruct), a directory that starts with /, ./, ../ "
        f"or ~, or a bundled model (bundled:demo-tactical){written}"
    )
