"""The command line: `sage-fed`.

Owns: the list of commands. One module each: `serve`, `ask`, `chat`, `inspect`, `admin`, `demo`;
`options`, `render` and `exits` are what they share.
Does not know: torch, pydantic and the daemon until a command needs them, so that a question
starts at once.
Fails: with the exit codes of `exits.py`.
"""

from __future__ import annotations

import typer

from sage_fed import __version__
from sage_fed.cli import admin, ask, chat, demo, inspect, serve
from sage_fed.cli.exits import EXIT_CODES_HELP


def version() -> None:
    """Print the version."""
    typer.echo(f"sage-fed {__version__}")


def build_app() -> typer.Typer:
    """The commands, in the order of `--help`."""
    app = typer.Typer(
        name="sage-fed",
        help="Two language models on one device, one budget.",
        epilog=EXIT_CODES_HELP,
        no_args_is_help=True,
        add_completion=False,
        # A traceback's local variables would show prompts and tokens.
        pretty_exceptions_enable=False,
    )
    app.command()(serve.serve)
    app.command()(demo.demo)
    app.command()(ask.ask)
    app.command()(chat.chat)
    app.command()(inspect.quote)
    app.command()(inspect.budget)
    app.add_typer(inspect.ledger_app())
    app.command()(inspect.models)
    app.command()(inspect.status)
    app.command()(serve.config)
    app.add_typer(admin.admin_app())
    app.command()(version)
    return app


def main() -> None:
    """Run one command and exit with its code."""
    build_app()()
