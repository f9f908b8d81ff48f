"""`ask`, `chat`, `quote` and `budget`: what a client asks of the daemon.

Owns: the printing of one job's stream; a conversation's history (in this process only) and its
slash commands; the tables of quote and budget.
Does not know: the wire.
Fails: exit codes of `exits.py`, 1 for an answer that was cut; an interrupted answer is cancelled
on the daemon too. On a terminal a refused turn of a conversation is reported and forgotten; with
piped input (one turn a line) any failure ends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated

import typer

from sage_fed.cli import options
from sage_fed.cli.exits import ConnectionBroke, ExitCode, as_options, explain, reported
from sage_fed.cli.options import Caller, Connection, JobOptions, OptionGroup, grouped, option
from sage_fed.cli.render import (
    atp_number,
    card_fit,
    format_atp,
    format_rate,
    format_seconds,
    join_parts,
    print_fields,
    print_table,
    printable,
)
from sage_fed.cli.streams import complain
from sage_fed.client import Client
from sage_fed.core import (
    Budget,
    CardStatus,
    DaemonStatus,
    Event,
    Finished,
    JobSpec,
    Logprob,
    Message,
    Mode,
    Phase,
    Price,
    Quote,
    Revised,
    Route,
    SamplingRequest,
    Started,
    StopReason,
)
from sage_fed.errors import CannotConnect, SageFedError

_CUTS = {
    StopReason.ABORTED: "aborted by an operator or by the daemon's stop",
    StopReason.CANCELLED: "the job was cancelled",
    StopReason.DEADLINE: "the deadline passed",
}


@dataclass(slots=True)
class Answer:
    """What one stream has delivered so far; its fields are what `--json` has."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    started: Started | None = None
    finished: Finished | None = None

    def revise(self) -> None:
        """Forget what was taken back."""
        self.text, self.token_ids, self.logprobs = "", [], []

    @property
    def cut(self) -> str:
        """Why it ended before the model or its limits did, in words; "" where it did not."""
        return _CUTS.get(self.finished.stop_reason, "") if self.finished else ""


def follow(events: Iterable[Event], show: Callable[[str], None]) -> Answer:
    """Read a stream to its end, showing each piece of text when it arrives.

    Raises: `ConnectionBroke` where the daemon is lost after the stream has begun.
    """
    answer = Answer()
    try:
        for event in events:
            if isinstance(event, Started):
                answer.started = event
            elif isinstance(event, Finished):
                answer.finished = event
            elif isinstance(event, Revised):
                answer.revise()
                show("\n(revised)\n")
            else:
                answer.text += event.text
                answer.token_ids.extend(event.token_ids)
                answer.logprobs.extend(event.logprobs)
                if event.text:
                    show(event.text)
    except CannotConnect as error:
        if answer.started is None:
            raise
        if answer.text and not answer.text.endswith("\n"):
            show("\n")
        raise ConnectionBroke(error.address) from None
    return answer


def complain_if_cut(answer: Answer) -> bool:
    """Say on stderr that the answer is not whole, where it is not; whether it was said."""
    if answer.cut:
        again = ""
        if answer.started is not None and answer.started.replayed:
            again = (
                ", when this request id was first asked; "
                "choose another --request-id to have it whole"
            )
        complain(f"the answer was cut: {answer.cut}{again}")
    return bool(answer.cut)


def show_text(text: str) -> None:
    """Write a piece of an answer at once; a terminal gets no control codes from a model."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def show_footer(answer: Answer) -> None:
    """Say on a terminal's stderr how the answer was made and what it cost."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        for line in footer(answer, width):
            typer.secho(line, err=True, dim=True)


def footer(answer: Answer, width: int) -> list[str]:
    """How the answer was made and what it cost, in lines of at most `width`."""
    started, finished = answer.started, answer.finished
    if started is None or finished is None:
        return []
    usage, timing = finished.usage, finished.timing
    asked = started.route.requested
    rate = format_rate(usage.output_tokens - 1, timing.decode_s)
    parts = [
        f"{_served_by(started.route, finished)} ({started.route.reason})"
        + (f", instead of {asked.name}" if started.route.downgraded and asked else ""),
        f"{usage.prompt_tokens} + {usage.output_tokens} tokens"
        + (f" ({usage.cached_tokens} cached)" if usage.cached_tokens else "")
        + _drafted(started.route, finished),
        f"first after {format_seconds(timing.time_to_first_token_s)}" * bool(usage.output_tokens),
        f"{rate} tok/s" if rate else "",
        finished.stop_reason.value.replace("_", " "),
        _charged(finished.price),
        f"{format_atp(finished.balance_uatp)} left",
    ]
    if started.replayed:
        parts.append("replayed")
    return join_parts(filter(None, parts), width)


def _served_by(route: Route, finished: Finished) -> str:
    """Who answered, and how."""
    if route.mode is not Mode.CASCADE:
        how = "" if route.mode is Mode.SINGLE else f", {route.mode.value}"
        return f"{route.tier.name}{how}"
    doubt = finished.error_probability
    outcome = finished.cascade.value if finished.cascade else "undecided"
    return f"cascade, {outcome}" + ("" if doubt is None else f", {doubt:.0%} likely wrong")


def _drafted(route: Route, finished: Finished) -> str:
    """How many output tokens were drafted and accepted, and by whom; "" where none was."""
    usage = finished.usage
    done = {(n.tier, n.phase): n.tokens for n in usage.by_phase if n.tier == route.tier}
    if (route.tier, Phase.VERIFY) not in done:
        return ""
    accepted = usage.output_tokens - done.get((route.tier, Phase.DECODE), 0)
    made = sum(n.tokens for n in usage.by_phase if n.phase is Phase.DRAFT)
    drafters = {n.tier.name for n in usage.by_phase if n.phase is Phase.DRAFT}
    # A cascade's first answer is a draft, too.
    drafters |= {stage.tier.name for stage in finished.timing.stages[:-1]}
    if made < accepted and finished.cascade is None:
        drafters |= {"earlier text"}
    return f", {accepted} of them drafted by {' and '.join(sorted(drafters, reverse=True))}"


def _charged(price: Price) -> str:
    """What it cost, and what it would have without drafts, where some were accepted."""
    if price.single_uatp in (0, price.charged_uatp):
        return f"{format_atp(price.charged_uatp)} charged"
    return f"{format_atp(price.charged_uatp)} instead of {atp_number(price.single_uatp)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions(OptionGroup):
    """How tokens are drawn and when the answer ends: the fields of `SamplingRequest`."""

    max_new_tokens: options.MaxNewTokens = None
    temperature: float | None = option("--temperature", "0 is greedy.", "T")
    top_p: float | None = option("--top-p", "Draw from the likeliest tokens of this sum.", "P")
    top_k: int | None = option("--top-k", "Draw from so many tokens; 0 is all.", "N", min=0)
    min_p: float | None = option(
        "--min-p", "Leave out what is less likely than this share of the best.", "P"
    )
    repetition_penalty: float | None = option(
        "--repetition-penalty", "Above 1 avoids repetition.", "R"
    )
    presence_penalty: float | None = option(
        "--presence-penalty", "Above 0 avoids tokens that the answer has already.", "R"
    )
    frequency_penalty: float | None = option(
        "--frequency-penalty", "Above 0 avoids them the more, the more often it has them.", "R"
    )
    seed: int | None = option("--seed", "Same seed, same text.", "N", min=0)
    stop: list[str] | None = option("--stop", "End before this text; may be repeated.", "TEXT")
    stop_token_ids: list[int] | None = option(
        "--stop-token-id", "End before this token; may be repeated.", "ID", min=0
    )
    ignore_eos: bool = option("--ignore-eos", "Go on when the model would end.", default=False)
    deadline_s: float | None = option("--deadline", "Stop after this long.", "SECONDS")
    top_logprobs: int | None = option(
        "--logprobs", "Log-probabilities, and N alternatives each.", "N", min=0
    )

    def request(self) -> SamplingRequest:
        """Return them as the client sends them."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {"stop": tuple(self.stop or ()), "stop_token_ids": tuple(self.stop_token_ids or ())}
        return SamplingRequest(**given | lists)


@grouped
def ask(
    words: Annotated[list[str] | None, options.PROMPT] = None,
    *,
    job: JobOptions,
    system: options.System = None,
    sampling: SamplingOptions,
    request_id: Annotated[
        str,
        typer.Option(
            "--request-id", metavar="ID", help="The same id is answered, and charged, once."
        ),
    ] = "",
    daemon: Caller,
) -> None:
    """Ask one question and stream the answer.

    Piped, stdout is the answer and nothing else; what it cost goes to a terminal's stderr.
    """
    prompt = options.conversation(system, Message("user", options.read_prompt(words)))
    spec = job.spec(prompt, sampling.request(), request_id)
    show = _show_nothing if daemon.as_json else show_text
    answer = daemon.report(lambda client: follow(client.stream(spec), show), _print_answer)
    if complain_if_cut(answer):
        raise typer.Exit(ExitCode.ERROR)


def _show_nothing(_text: str) -> None:
    """Wait for the end, where `--json` prints everything."""


def _print_answer(answer: Answer) -> None:
    """Close the text's last line, then what is about the answer, on stderr."""
    if not answer.text.endswith("\n"):
        typer.echo()
    for entry in answer.logprobs:
        others = " ".join(f"{token_id}:{logprob:.3f}" for token_id, logprob in entry.top)
        typer.echo(f"{entry.token_id:>6} {entry.logprob:8.3f}  {others}", err=True)
    show_footer(answer)


_SLASH_COMMANDS = "/tier auto|tactical|strategic   /budget   /reset (forget)   /quit"


@dataclass(slots=True)
class Conversation:
    """What has been said, who answers next, and what a turn may take."""

    options: JobOptions
    sampling: SamplingRequest
    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    def job(self, question: str) -> JobSpec:
        """The conversation so far with one more user turn at its end."""
        prompt = options.conversation(self.system, *self.turns, Message("user", question))
        return self.options.spec(prompt, self.sampling)

    def remember(self, question: str, answer: str) -> None:
        """Keep a finished turn."""
        self.turns += [Message("user", question), Message("assistant", answer)]


@grouped
def chat(
    *,
    tier: options.TierOption = options.TierChoice.AUTO,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = None,
    max_cost: options.MaxCost = None,
    daemon: Connection,
) -> None:
    """Talk, turn by turn.

    /tier changes who answers, /budget shows the balance, /reset forgets, /quit or Ctrl-D ends.
    Ctrl-C stops an answer. Piped input is one turn a line.
    """
    conversation = Conversation(
        JobOptions(tier=tier, max_cost=max_cost),
        SamplingRequest(max_new_tokens=max_new_tokens),
        system,
    )
    with reported():
        daemon.call(lambda client: _talk(client, conversation))


def _talk(client: Client, conversation: Conversation) -> None:
    """Read lines until the input ends or /quit."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            # Its import gives `input` arrow keys and a history; not every Python has it.
            import readline  # noqa: F401, PLC0415
        typer.secho(_SLASH_COMMANDS, err=True, dim=True)
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
        tier = options.TierChoice(argument)
        conversation.options = replace(conversation.options, tier=tier)
        typer.echo(f"tier {argument}", err=True)
    elif name == "/budget":
        typer.echo(f"{format_atp(client.budget().balance_uatp)} left", err=True)
    elif name == "/reset":
        conversation.turns.clear()
        typer.echo("forgotten", err=True)
    else:
        typer.echo(_SLASH_COMMANDS, err=True)


def _read_line(conversation: Conversation) -> str | None:
    """The next line, or None at the end of the input."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip() if line else None
    try:
        return input(f"{conversation.options.tier.name}> ").strip()
    except EOFError:
        typer.echo(err=True)
        return None


@grouped
def quote(
    words: Annotated[list[str] | None, options.PROMPT] = None,
    *,
    job: JobOptions,
    max_new_tokens: options.MaxNewTokens = None,
    daemon: Caller,
) -> None:
    """Say what a question would cost, and who would answer.

    The cost is the most that it may be; nothing is spent.
    """
    prompt = options.conversation(None, Message("user", options.read_prompt(words)))
    spec = job.spec(prompt, SamplingRequest(max_new_tokens=max_new_tokens))
    daemon.report(lambda client: client.quote(spec), _print_quote)


def _print_quote(answer: Quote) -> None:
    print_table(
        {
            "tier": tier.tier.name,
            "mode": tier.mode.value,
            ">at most ATP": atp_number(tier.worst_case_uatp),
            ">about ATP": atp_number(tier.expected_uatp) if tier.expected_uatp else "-",
            ">likely wrong": "-" if tier.expected_error is None else f"{tier.expected_error:.1%}",
            "affordable": "yes" if tier.affordable else "no",
            ">takes about": "-" if tier.estimated_s is None else format_seconds(tier.estimated_s),
        }
        for tier in answer.tiers
    )
    typer.echo()
    decision = answer.decision
    if isinstance(decision, Route):
        how = "" if decision.mode is Mode.SINGLE else f", {decision.mode.value}"
        verdict = ("would run on", f"{decision.tier.name}{how} ({decision.reason})")
    else:
        verdict = ("would be refused", f"{as_options(decision.message)} ({decision.reason})")
    print_fields(
        (
            verdict,
            ("tokens", f"{answer.prompt_tokens} prompt + {answer.max_new_tokens} new at most"),
            ("balance", format_atp(answer.balance_uatp)),
            ("rate card", answer.rate_card),
        )
    )


@grouped
def budget(*, daemon: Caller) -> None:
    """Show the account: balance, held, spent, refill."""
    daemon.report(
        lambda client: (client.budget(), client.status()),
        lambda both: _print_budget(*both),
        lambda both: _budget_object(*both),
    )


def _budget_object(books: Budget, now: DaemonStatus) -> dict[str, object]:
    fields = {field.name: getattr(books, field.name) for field in dataclasses.fields(books)}
    card = CardStatus(now.rate_card, now.cost_ratio, now.rate_card_fit, now.rate_card_note)
    return {**fields, "rate_card": card}


def _print_budget(books: Budget, now: DaemonStatus) -> None:
    print_fields(
        (
            ("account", books.account),
            ("balance", format_atp(books.balance_uatp)),
            ("held", format_atp(books.held_uatp)),
            ("spent", f"{format_atp(books.discharged_uatp)} (as ADP)"),
            ("capacity", format_atp(books.capacity_uatp)),
            ("refill", f"{format_atp(books.refill_uatp_per_s)}/s"),
            ("strategic floor", format_atp(books.strategic_floor_uatp)),
            ("rate card", f"{now.rate_card}, {card_fit(now)}"),
        )
    )
