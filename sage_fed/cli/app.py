"""The list of commands, and what is true of each of them.

Owns: the order and the help of the commands; usage errors; the end of a command whose output
cannot be written.
Does not know: torch, pydantic, rich and the daemon until a command needs them, so that a question
starts at once.
Fails: with the exit codes of `exits.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from sage_fed import __version__
from sage_fed.cli import ask, bench_commands, demo, operate, serve, top
from sage_fed.cli.exits import EXIT_CODES_HELP, ExitCode
from sage_fed.cli.streams import complain, give_up_output, is_output_failure


class CommandLine(TyperGroup):
    """The root command: every way out of a command ends in one exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,  # noqa: ARG002 - no completion is installed
        standalone_mode: bool = True,  # noqa: ARG002 - it always exits
        windows_expand_args: bool = True,  # noqa: ARG002 - no Windows
        **extra: Any,  # noqa: ANN401 - as the parser has it
    ) -> NoReturn:
        """Run the command of `args` and exit."""
        given = list(sys.argv[1:] if args is None else args)
        try:
            code = self._run(prog_name or "sage-fed", given, extra)
        except OSError as error:
            if not is_output_failure(error):
                raise
            code = give_up_output(error)
        sys.exit(code)

    def _run(self, name: str, given: list[str], extra: dict[str, Any]) -> int:
        try:
            with self.make_context(name, list(given), **extra) as context:
                self.invoke(context)
        except typer.Exit as done:
            return done.exit_code
        except typer.TyperException as error:
            _tell_usage(error, as_json="--json" in given)
            return ExitCode.USAGE
        except (KeyboardInterrupt, typer.Abort):
            return ExitCode.INTERRUPTED
        return ExitCode.OK


def _tell_usage(error: typer.TyperException, *, as_json: bool) -> None:
    """One line for a person, and with `--json` an object for a program."""
    # "Value error, " is what the parser's parser says before our own sentence.
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    message = message[:1].lower() + message[1:]
    if as_json:
        typer.echo(json.dumps({"error": {"reason": "USAGE", "message": message}}))
    context: typer.Context | None = getattr(error, "ctx", None)
    command = context.command_path if context else "sage-fed"
    complain(f"error: {message}; see `{command} --help`")


def version() -> None:
    """Print the versions: ours, Python's and torch's."""
    # What the package is installed with; importing torch to ask it takes seconds.
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "not installed"
    typer.echo(f"sage-fed {__version__} (Python {platform.python_version()}, torch {torch})")


def root(
    context: typer.Context,
    *,
    versions: Annotated[
        bool, typer.Option("--version", help="Print the versions, and do nothing.")
    ] = False,
) -> None:
    """The options that stand before a command."""
    if versions:
        version()
        raise typer.Exit
    _help_if_bare(context)


def _help_if_bare(context: typer.Context) -> None:
    """Print a group's help where no command is given, and exit with 2: nothing was done."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(ExitCode.USAGE)


def _group(
    name: str,
    help_text: str,
    commands: Mapping[str, Callable[..., None]],
    callback: Callable[..., None] = _help_if_bare,
) -> typer.Typer:
    """Return an app of these commands by name; `callback` runs before one, or instead of it."""
    app = typer.Typer(
        name=name,
        invoke_without_command=True,
        callback=callback,
        help=help_text,
        epilog=EXIT_CODES_HELP,
    )
    for each, command in commands.items():
        app.command(each, epilog=EXIT_CODES_HELP)(command)
    return app


def build_app() -> typer.Typer:
    """The commands, in the order of `--help`."""
    app = typer.Typer(
        name="sage-fed",
        cls=CommandLine,
        help="Two language models on one device, one budget.",
        epilog=EXIT_CODES_HELP,
        invoke_without_command=True,
        callback=root,
        add_completion=False,
        # Plain text: boxes cost half of 80 columns, and yellow is unreadable on white.
        rich_markup_mode=None,
        # A traceback's local variables would show prompts and tokens.
        pretty_exceptions_enable=False,
    )
    commands: tuple[Callable[..., None], ...] = (
        serve.serve,
        demo.demo,
        ask.ask,
        ask.chat,
        ask.quote,
        ask.budget,
        operate.models,
        operate.status,
        top.top,
        bench_commands.calibrate,
        serve.config,
        serve.install_service,
        serve.uninstall_service,
        version,
    )
    for command in commands:
        app.command(epilog=EXIT_CODES_HELP)(command)
    for group in (
        _group(
            "ledger",
            "List the account's entries; audit the books, or copy them.",
            {"check": operate.check_books, "backup": operate.back_up_books},
            callback=operate.list_entries,
        ),
        _group(
            "admin",
            "Operate the daemon. The token is SAGE_FED_TOKEN, or the one in its state directory.",
            {
                "load": operate.load,
                "abort": operate.abort,
                "drain": operate.drain,
                "set-budget": operate.set_budget,
                "adopt-card": operate.adopt_card,
                "adopt-quality-card": operate.adopt_quality_card,
            },
        ),
        _group(
            "token",
            "Say who may call. A running daemon follows within two seconds.",
            {"create": operate.create, "revoke": operate.revoke, "list": operate.list_tokens},
        ),
        _group(
            "bench",
            "Measure models on this machine; the daemon should not be running.",
            {"inertia": bench_commands.inertia},
        ),
        _group(
            "dev",
            "Tools for measuring and developing sage-fed itself.",
            {"make-checkpoint": bench_commands.make_checkpoint},
        ),
    ):
        app.add_typer(group)
    return app
