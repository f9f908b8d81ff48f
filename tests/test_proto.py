"""The wire contract: its style, its compatibility, and that the generated code is its code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from surroundings import require_tool

ROOT = Path(__file__).parent.parent
PROTOS = sorted(path.relative_to(ROOT / "proto") for path in (ROOT / "proto").rglob("*.proto"))
BASELINE = Path(__file__).parent / "data" / "baseline.binpb"


def run(*command: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_the_protos_pass_buf_lint() -> None:
    """STANDARD, as configured in buf.yaml."""
    assert (0, "") == run(require_tool("buf"), "lint")


def test_the_protos_are_formatted() -> None:
    """One format, so that a diff is a change."""
    assert (0, "") == run(require_tool("buf"), "format", "--diff", "--exit-code")


def test_the_contract_breaks_nobody() -> None:
    """Nothing that the baseline promised is taken back.

    The baseline is what has been released: `buf build -o tests/data/baseline.binpb`.
    """
    assert (0, "") == run(require_tool("buf"), "breaking", "--against", BASELINE)


def test_a_break_would_be_noticed(tmp_path: Path) -> None:
    """The check above can fail: a renumbered field does not pass it."""
    buf = require_tool("buf")
    for path in PROTOS:
        target = tmp_path / "proto" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / "proto" / path).read_text()
        target.write_text(text.replace("string job_id = 1;", "string job_id = 99;"))
    (tmp_path / "buf.yaml").write_text((ROOT / "buf.yaml").read_text())
    code, text = run(buf, "breaking", tmp_path, "--against", BASELINE)
    assert 0 != code
    assert "job_id" in text


def test_the_generated_code_is_up_to_date(tmp_path: Path) -> None:
    """`make proto` would change nothing."""
    outputs = (f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "pyi"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", *outputs]
    assert (0, "") == run(*command, *map(str, PROTOS))
    fresh = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.py*")}
    committed = {
        path.relative_to(ROOT): path.read_bytes()
        for path in (ROOT / "sage_fed" / "v1").glob("*_pb2*.py*")
    }
    assert fresh.keys() == committed.keys()
    assert [] == [str(path) for path in sorted(fresh) if fresh[path] != committed[path]]
