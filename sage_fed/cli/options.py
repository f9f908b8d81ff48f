"""Options that several commands share, and what they describe: a job, a daemon to call.

Owns: names, help texts and parsing of the options; reading a prompt; opening and closing the
client; the files in a state directory that commands of the same machine read.
Does not know: the wire, rendering.
Fails: `typer.BadParameter` for a value that cannot be parsed (exit code 2); `ConfigError` for a
token that cannot be read; the error tree, as the client raises it.
"""

from __future__ import annotations

import enum
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from sage_fed.cli.exits import reported
from sage_fed.cli.render import parse_atp, print_json
from sage_fed.cli.streams import complain
from sage_fed.client import Client, Tls, leaves_machine
from sage_fed.core import JobSpec, Message, Mode, Prompt, SamplingRequest, Tier
from sage_fed.environment import mistyped
from sage_fed.errors import ConfigError
from sage_fed.trusted_files import owners_beside, read_trusted

T = TypeVar("T")
DEFAULT_ADDRESS = "127.0.0.1:6590"


class OptionGroup:
    """A dataclass whose fields are options; a command takes it as one parameter."""

    __slots__ = ()


def option(
    flag: str,
    help_text: str,
    metavar: str | None = None,
    *,
    default: Any = None,  # noqa: ANN401 - a field of any type
    **more: Any,  # noqa: ANN401 - as typer has it
) -> Any:  # noqa: ANN401 - a field of any type
    """Return a group's field that is set by this option; `MISSING` as default requires it."""
    declared = typer.Option(flag, metavar=metavar, help=help_text, **more)
    return field(default=default, metadata={"option": declared})


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with a group's options in place of each parameter that is a group."""
    own = inspect.signature(command, eval_str=True)
    groups: dict[str, type[Any]] = {
        name: parameter.annotation
        for name, parameter in own.parameters.items()
        if inspect.isclass(parameter.annotation) and issubclass(parameter.annotation, OptionGroup)
    }

    @functools.wraps(command)
    def run(**given: Any) -> None:  # noqa: ANN401 - whatever the command takes
        for name, group in groups.items():
            given[name] = group(**{each.name: given.pop(each.name) for each in fields(group)})
        command(**given)

    shown = [
        option
        for name, parameter in own.parameters.items()
        for option in (_options_of(groups[name]) if name in groups else (parameter,))
    ]
    run.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined] # functions may have one
    run.__annotations__ = {option.name: option.annotation for option in shown}
    return run


def _options_of(group: type[Any]) -> Iterator[inspect.Parameter]:
    """Yield the group's fields as parameters; those of a subclass stand before its base's."""
    hints = get_type_hints(group, include_extras=True)
    known = {each.name: each for each in fields(group)}
    for name in (name for owner in group.__mro__ for name in inspect.get_annotations(owner)):
        default, declared = known[name].default, known[name].metadata.get("option")
        yield inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is MISSING else default,
            annotation=Annotated[hints[name], declared] if declared else hints[name],
        )


class TierChoice(enum.Enum):
    """What `--tier` takes; `auto` lets the daemon choose."""

    AUTO = "auto"
    TACTICAL = "tactical"
    STRATEGIC = "strategic"

    @property
    def tier(self) -> Tier | None:
        """The tier asked for; None is "you choose"."""
        return None if self is TierChoice.AUTO else Tier.named(self.value)


class ModeChoice(enum.Enum):
    """What `--mode` takes; `auto` lets the daemon choose."""

    AUTO = "auto"
    SINGLE = "single"
    SPECULATIVE = "speculative"
    CASCADE = "cascade"

    @property
    def mode(self) -> Mode | None:
        """The mode asked for; None is "you choose"."""
        return None if self is ModeChoice.AUTO else Mode(self.value)


def atp_amount(text: str) -> int:
    """Return an amount of ATP on the command line as uATP."""
    try:
        return parse_atp(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def one_of(name: str, known: tuple[str, ...], option: str) -> str:
    """Return the name.

    Raises:
        typer.BadParameter: it is not one of `known`.
    """
    if name not in known:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(known)}", param_hint=option)
    return name


PROMPT: Any = typer.Argument(metavar="PROMPT", help="The question; `-` or nothing reads stdin.")
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        envvar="SAGE_FED_TOKEN",
        help="Bearer token; others see a command line, so better a file or the environment.",
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file", metavar="FILE", envvar="SAGE_FED_TOKEN_FILE", help="File with the token."
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        metavar="FILE",
        envvar="SAGE_FED_TLS_CA",
        help="Encrypt; trust who signed with these certificates (PEM).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
TierOption = Annotated[
    TierChoice,
    typer.Option("--tier", metavar="TIER", help="auto, tactical or strategic: which one answers."),
]
MaxCost = Annotated[
    int | None,
    typer.Option("--max-cost", parser=atp_amount, metavar="ATP", help="The most it may cost."),
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="The system message.")]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, metavar="N", help="The longest answer.")
]
# No `envvar` below: `load_settings` reads the environment itself and remembers the origin.
Profile = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME",
        help="Packaged settings: qwen2.5 (default), jetson-thor or demo.",
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file of settings.")
]
# A text, which the settings read: as a path, an empty one would be the current directory.
StateDir = Annotated[
    str | None,
    typer.Option("--state-dir", metavar="DIR", help="Where the daemon keeps its books."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions(OptionGroup):
    """Who answers, and what it may cost."""

    tier: TierOption = TierChoice.AUTO
    max_cost: MaxCost = None
    allow_downgrade: bool = option(
        "--allow-downgrade", "A cheaper tier may answer instead.", default=False
    )
    complexity: float | None = option(
        "--complexity", "How hard it is; a hint for --tier auto.", "C", min=0.0, max=1.0
    )
    task_class: str = option(
        "--task-class",
        "What kind of task it is, as the quality card has it; any by default.",
        "CLASS",
        default="",
    )

    mode: ModeChoice = option(
        "--mode",
        "How it is served: one tier, drafts that the strategic tier verifies, or the tactical "
        "tier and, in doubt, the strategic one.",
        default=ModeChoice.AUTO,
    )
    max_error: float | None = option(
        "--max-error", "Probability of a wrong answer to put up with.", "P", min=0.0, max=1.0
    )
    accept_revisions: bool = option(
        "--accept-revisions", "Show a cascade's first answer before it is decided.", default=False
    )

    def spec(self, prompt: Prompt, sampling: SamplingRequest, request_id: str = "") -> JobSpec:
        """Return the job as the client sends it; the daemon knows the account from the token."""
        return JobSpec(
            account="",
            prompt=prompt,
            requested=self.tier.tier,
            allow_downgrade=self.allow_downgrade,
            max_cost_uatp=self.max_cost,
            complexity=self.complexity,
            task_class=self.task_class,
            client_request_id=request_id,
            sampling=sampling,
            mode=self.mode.mode,
            max_error=self.max_error,
            accept_revisions=self.accept_revisions,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection(OptionGroup):
    """A daemon to call, and as whom. The default is this machine's, without a token."""

    address: str = option(
        "--address",
        "The daemon's HOST:PORT or unix:/PATH.",
        "ADDRESS",
        default=DEFAULT_ADDRESS,
        envvar="SAGE_FED_ADDRESS",
    )
    token: Token = None
    token_file: TokenFile = None
    tls: bool = option("--tls", "Encrypt; trust whom this system does.", default=False)
    tls_ca: TlsCa = None
    tls_cert: Path | None = option(
        "--tls-cert",
        "Certificate to show, where the daemon asks for one.",
        "FILE",
        envvar="SAGE_FED_TLS_CERT",
    )
    tls_key: Path | None = option(
        "--tls-key", "Its private key.", "FILE", envvar="SAGE_FED_TLS_KEY"
    )
    tls_name: str | None = option(
        "--tls-name",
        "Name in the daemon's certificate, if it is not the address's.",
        "NAME",
        envvar="SAGE_FED_TLS_NAME",
    )

    @property
    def encryption(self) -> Tls | None:
        """What the connection is encrypted with; None where it is not."""
        wanted = Tls(self.tls_ca, self.tls_cert, self.tls_key, self.tls_name)
        return wanted if self.tls or wanted != Tls() else None

    def call(self, work: Callable[[Client], T]) -> T:
        """Connect, do the work, disconnect. Ctrl-C ends the work, and with it its RPC."""
        for name, meant in mistyped(os.environ):
            complain(f"warning: {name} is not known; did you mean {meant}?")
        token, tls = self.read_token(), self.encryption
        if token and tls is None and leaves_machine(self.address):
            complain(f"warning: the token goes to {self.address} in plain text; see --tls-ca")
        with Client(self.address, token, tls=tls) as client:
            return work(client)

    def arguments(self) -> list[str]:
        """Return the options that lead another command here; tokens stay out of it."""
        given: tuple[tuple[str, object], ...] = (
            ("--address", self.address if self.address != DEFAULT_ADDRESS else None),
            ("--token-file", self.token_file),
            ("--tls-ca", self.tls_ca),
            ("--tls-cert", self.tls_cert),
            ("--tls-key", self.tls_key),
            ("--tls-name", self.tls_name),
        )
        words = [word for option, value in given if value for word in (option, str(value))]
        return [*words, "--tls"] if self.encryption == Tls() else words

    def read_token(self) -> str | None:
        """Return the token, wherever it was given."""
        return read_token(self.token, self.token_file)


def report(
    work: Callable[[], T],
    show: Callable[[T], None],
    plain: Callable[[T], object] = lambda answer: answer,
    *,
    as_json: bool,
) -> T:
    """Do the work and print what it returns: for a person, or as the object that `plain` makes.

    Raises:
        typer.Exit: the work's error, after it has been told.
    """
    with reported(as_json=as_json):
        answer = work()
        if as_json:
            print_json(plain(answer))
        else:
            show(answer)
        return answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller(Connection):
    """A daemon to ask one thing, and the form of the answer."""

    as_json: AsJson = False

    def report(
        self,
        ask: Callable[[Client], T],
        show: Callable[[T], None],
        plain: Callable[[T], object] = lambda answer: answer,
    ) -> T:
        """Ask the daemon and print its answer, as `report` does."""
        return report(lambda: self.call(ask), show, plain, as_json=self.as_json)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator(Caller):
    """The same with the admin token of this machine's daemon, where no token is given."""

    state_dir: StateDir = None

    def call(self, work: Callable[[Client], T]) -> T:
        """Connect as an operator, do the work, disconnect."""
        token = self.read_token()
        if not token:
            from sage_fed.cli.serve import effective  # noqa: PLC0415 - pydantic takes half a second

            found = effective({"state_dir": self.state_dir}, None)
            token = admin_token(found.settings.state_dir)
        return Connection.call(replace(self, token=token, token_file=None), work)


def read_token(token: str | None, token_file: Path | None) -> str | None:
    """Return the token, wherever it was given.

    Raises:
        ConfigError: it is given twice, or the file cannot be read.
    """
    if token_file is None:
        return token
    if token:
        raise ConfigError("token: it is given twice; use one of --token and --token-file")
    try:
        return token_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"token_file: {token_file} cannot be read: {why}") from None


def admin_token(state_dir: Path) -> str:
    """Return the token that the running daemon wrote for operators of its machine."""
    path = state_dir / "admin.token"
    try:
        return read_trusted("admin token", path, owners_beside(path)).decode().strip()
    except OSError as error:
        raise ConfigError(
            f"admin token: {path} cannot be read ({error.strerror}); give --state-dir of the "
            "running daemon, or an admin's token in SAGE_FED_TOKEN"
        ) from None


def ledger_file(state_dir: Path) -> Path:
    """Return the books."""
    return state_dir / "ledger.db"


def assigned(assignments: list[str] | None) -> dict[str, str]:
    """Return the `--set` options by key."""
    pairs: dict[str, str] = {}
    for assignment in assignments or ():
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{assignment!r} is not KEY=VALUE", param_hint="--set")
        pairs[key.strip()] = value.strip()
    return pairs


def read_prompt(words: list[str] | None) -> str:
    """Return the prompt from the arguments, or from stdin with `-` or where something is piped."""
    if words and words != ["-"]:
        text, absent = " ".join(words), "no prompt"
    elif not words and sys.stdin.isatty():
        text, absent = "", "say what to ask, or pipe it in"
    else:
        text, absent = sys.stdin.read().strip(), "no prompt"
    if not text.strip():
        raise typer.BadParameter(absent, param_hint="prompt")
    try:
        text.encode()
    except UnicodeEncodeError:
        # Bytes that are no text come as halves of surrogate pairs, which no message can carry.
        raise typer.BadParameter("the prompt is not UTF-8 text", param_hint="prompt") from None
    return text


def conversation(system: str | None, *turns: Message) -> Prompt:
    """Return the turns, under a system message where one is given."""
    head = (Message("system", system),) if system else ()
    return Prompt(messages=(*head, *turns))
