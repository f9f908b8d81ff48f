"""`sage-fed chat`: a conversation with memory.

Owns: the history (in this process only), the slash commands.
Does not know: the wire, how an answer is printed (`ask.py`).
Fails: a refused turn is reported and forgotten, and the conversation goes on; a daemon that is
gone ends it. With piped input (one turn a line) any failure ends it, with its exit code.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from typing import Annotated

import typer

from sage_fed.cli import options
from sage_fed.cli.ask import complain_if_cut, follow, show_footer, show_text
from sage_fed.cli.connection import HERE, Connection, connected
from sage_fed.cli.exits import ExitCode, explain, reported
from sage_fed.cli.render import format_atp
from sage_fed.cli.streams import complain
from sage_fed.client import Client
from sage_fed.core import JobSpec, Message, Prompt, SamplingRequest
from sage_fed.errors import CannotConnect, SageFedError

_HELP = "/tier auto|tactical|strategic   /budget   /reset (forget)   /quit"


@dataclass(slots=True)
class Conversation:
    """What has been said, who answers next, and what a turn may take."""

    tier: options.TierChoice
    system: str | None = None
    max_new_tokens: int | None = None
    max_cost_uatp: int | None = None
    turns: list[Message] = field(default_factory=list)

    def job(self, question: str) -> JobSpec:
        """The conversation so far with one more user turn at its end."""
        head = (Message("system", self.system),) if self.system else ()
        return options.job_spec(
            Prompt(messages=(*head, *self.turns, Message("user", question))),
            tier=self.tier,
            max_cost_uatp=self.max_cost_uatp,
            sampling=SamplingRequest(max_new_tokens=self.max_new_tokens),
        )

    def remember(self, question: str, answer: str) -> None:
        """Keep a finished turn."""
        self.turns += [Message("user", question), Message("assistant", answer)]


@connected
def chat(
    *,
    tier: options.TierOption = options.TierChoice.AUTO,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="The system message.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    max_cost: options.MaxCost = None,
    daemon: Connection = HERE,
) -> None:
    """Talk, turn by turn.

    /tier changes who answers, /budget shows the balance, /reset forgets, /quit or Ctrl-D ends.
    Ctrl-C stops an answer. Piped input is one turn a line.
    """
    conversation = Conversation(tier, system, max_new_tokens, max_cost)
    with reported():
        daemon.call(lambda client: _talk(client, conversation))


def _talk(client: Client, conversation: Conversation) -> None:
    """Read lines until the input ends or /quit."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            # Its import gives `input` arrow keys and a history; not every Python has it.
            import readline  # noqa: F401, PLC0415
        typer.secho(_HELP, err=True, dim=True)
    while (line := _read_line(conversation)) is not None and line != "/quit":
        if line.startswith("/"):
            _command(client, conversation, line)
        elif line:
            _turn(client, conversation, line)


def _turn(client: Client, conversation: Conversation, question: str) -> None:
    """One question and its answer; on a terminal Ctrl-C stops the answer, not the conversation."""
    interactive = sys.stdin.isatty()
    try:
        answer = follow(client.stream(conversation.job(question)), show_text)
    except SageFedError as error:
        if not interactive or isinstance(error, CannotConnect):
            raise
        complain(explain(error))
        return
    except KeyboardInterrupt:
        if not interactive:
            raise
        typer.secho("\nstopped; this turn is forgotten", err=True, dim=True)
        return
    typer.echo()
    show_footer(answer)
    if complain_if_cut(answer) and not interactive:
        raise typer.Exit(ExitCode.ERROR)
    conversation.remember(question, answer.text)


def _command(client: Client, conversation: Conversation, line: str) -> None:
    """A line that begins with a slash."""
    name, _, argument = line.partition(" ")
    if name == "/tier" and argument in {choice.value for choice in options.TierChoice}:
        conversation.tier = options.TierChoice(argument)
        typer.echo(f"tier {argument}", err=True)
    elif name == "/budget":
        typer.echo(f"{format_atp(client.budget().balance_uatp)} left", err=True)
    elif name == "/reset":
        conversation.turns.clear()
        typer.echo("forgotten", err=True)
    else:
        typer.echo(_HELP, err=True)


def _read_line(conversation: Conversation) -> str | None:
    """The next line, or None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input(f"{conversation.tier.name}> ").strip()
    except EOFError:
        typer.echo(err=True)
        return None
