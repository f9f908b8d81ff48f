"""The command line: `sage-fed`.

Owns: the entry point. `app` lists the commands: `ask.py` a client's, `operate.py` an operator's,
`serve.py`, `top.py`, `demo.py` and `bench_commands.py` the others; `options`, `render`, `drawing`,
`streams` and `exits` are what they share.
Does not know: any command; importing this package imports nothing else.
Fails: with the exit codes of `exits.py`.
"""

from __future__ import annotations

import os


def main() -> None:
    """Run one command and exit with its code."""
    from sage_fed.cli.streams import leave_on_interrupt, open_standard_streams  # noqa: PLC0415

    open_standard_streams()
    # gRPC's C core would write to stderr by itself, past every format, from its import on.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    with leave_on_interrupt():
        # Most of a second on a slow machine, in which a person may already regret the command.
        from sage_fed.cli.app import build_app  # noqa: PLC0415

        app = build_app()
    app()
