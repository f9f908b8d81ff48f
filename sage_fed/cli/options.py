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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from sage_fed.cli.exits import ExitCode
from sage_fed.cli.render import parse_atp
from sage_fed.cli.streams import complain
from sage_fed.client import Client, Tls, leaves_machine
from sage_fed.core import JobSpec, Message, Prompt, SamplingRequest, Tier
from sage_fed.environment import mistyped
from sage_fed.errors import ConfigError
from sage_fed.trusted_files import owners_beside, read_trusted


class TierChoice(enum.Enum):
    """What `--tier` takes; `auto` lets the daemon choose."""

    AUTO = "auto"
    TACTICAL = "tactical"
    STRATEGIC = "strategic"

    @property
    def tier(self) -> Tier | None:
        """The tier asked for; None is "you choose"."""
        return None if self is TierChoice.AUTO else Tier.named(self.value)


def atp_amount(text: str) -> int:
    """An amount of ATP on the command line, as uATP."""
    try:
        return parse_atp(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


PROMPT: Any = typer.Argument(metavar="PROMPT", help="The question; `-` or nothing reads stdin.")
Address = Annotated[
    str,
    typer.Option(
        "--address",
        metavar="ADDRESS",
        envvar="SAGE_FED_ADDRESS",
        help="The daemon's HOST:PORT or unix:/PATH.",
    ),
]
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
Encrypted = Annotated[bool, typer.Option("--tls", help="Encrypt; trust whom this system does.")]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        "--tls-ca",
        metavar="FILE",
        envvar="SAGE_FED_TLS_CA",
        help="Encrypt; trust who signed with these certificates (PEM).",
    ),
]
TlsCert = Annotated[
    Path | None,
    typer.Option(
        "--tls-cert",
        metavar="FILE",
        envvar="SAGE_FED_TLS_CERT",
        help="Certificate to show, where the daemon asks for one.",
    ),
]
TlsKey = Annotated[
    Path | None,
    typer.Option("--tls-key", metavar="FILE", envvar="SAGE_FED_TLS_KEY", help="Its private key."),
]
TlsName = Annotated[
    str | None,
    typer.Option(
        "--tls-name",
        metavar="NAME",
        envvar="SAGE_FED_TLS_NAME",
        help="Name in the daemon's certificate, if it is not the address's.",
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
AllowDowngrade = Annotated[
    bool, typer.Option("--allow-downgrade", help="A cheaper tier may answer instead.")
]
Complexity = Annotated[
    float | None,
    typer.Option(
        "--complexity",
        min=0.0,
        max=1.0,
        metavar="C",
        help="How hard it is; a hint for --tier auto.",
    ),
]
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
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting, such as tactical.max_batch=8."),
]


def assigned(assignments: list[str] | None) -> dict[str, str]:
    """The `--set` options by key."""
    pairs: dict[str, str] = {}
    for assignment in assignments or ():
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{assignment!r} is not KEY=VALUE", param_hint="--set")
        pairs[key.strip()] = value.strip()
    return pairs


def read_prompt(words: list[str] | None) -> str:
    """The prompt from the arguments, or from stdin with `-` or when something is piped in."""
    text = _given_prompt(words)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Bytes that are no text come as halves of surrogate pairs, which no message can carry.
        raise typer.BadParameter("the prompt is not UTF-8 text", param_hint="prompt") from None
    return text


def _given_prompt(words: list[str] | None) -> str:
    if words and words != ["-"]:
        text = " ".join(words)
        if not text.strip():
            raise typer.BadParameter("no prompt", param_hint="prompt")
        return text
    if not words and sys.stdin.isatty():
        raise typer.BadParameter("say what to ask, or pipe it in", param_hint="prompt")
    text = sys.stdin.read().strip()
    if not text:
        raise typer.BadParameter("no prompt", param_hint="prompt")
    return text


def help_if_bare(context: typer.Context) -> None:
    """A group without a command: what there is, and exit code 2 because nothing was done."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(ExitCode.USAGE)


def conversation(text: str, system: str | None) -> Prompt:
    """One user turn, under a system message where one is given."""
    head = (Message("system", system),) if system else ()
    return Prompt(messages=(*head, Message("user", text)))


def job_spec(
    prompt: Prompt,
    *,
    tier: TierChoice = TierChoice.AUTO,
    max_cost_uatp: int | None = None,
    allow_downgrade: bool = False,
    complexity: float | None = None,
    request_id: str = "",
    sampling: SamplingRequest | None = None,
) -> JobSpec:
    """The job as the client sends it; the daemon knows the account from the token."""
    return JobSpec(
        account="",
        prompt=prompt,
        requested=tier.tier,
        allow_downgrade=allow_downgrade,
        max_cost_uatp=max_cost_uatp,
        complexity=complexity,
        client_request_id=request_id,
        sampling=sampling or SamplingRequest(),
    )


T = TypeVar("T")

DEFAULT_ADDRESS = "127.0.0.1:6590"


@dataclass(frozen=True, slots=True)
class Connection:
    """A daemon as the options describe it."""

    address: str = DEFAULT_ADDRESS
    token: str | None = None
    token_file: Path | None = None
    tls: Tls | None = None

    def call(self, work: Callable[[Client], T]) -> T:
        """Connect, do the work, disconnect. Ctrl-C ends the work, and with it its RPC."""
        for name, meant in mistyped(os.environ):
            complain(f"warning: {name} is not known; did you mean {meant}?")
        token = self.read_token()
        if token and self.tls is None and leaves_machine(self.address):
            complain(f"warning: the token goes to {self.address} in plain text; see --tls-ca")
        with Client(self.address, token, tls=self.tls) as client:
            return work(client)

    def as_operator(self, state_dir: str | None) -> Connection:
        """The same with the admin token of this machine's daemon, where no token is given."""
        token = operator_token(self.read_token(), state_dir)
        return replace(self, token=token, token_file=None)

    def arguments(self) -> list[str]:
        """The options that lead another command here; tokens stay out of it."""
        tls = self.tls or Tls()
        given: tuple[tuple[str, object], ...] = (
            ("--address", self.address if self.address != DEFAULT_ADDRESS else None),
            ("--token-file", self.token_file),
            ("--tls-ca", tls.ca),
            ("--tls-cert", tls.certificate),
            ("--tls-key", tls.key),
            ("--tls-name", tls.name),
        )
        words = [word for option, value in given if value for word in (option, str(value))]
        return [*words, "--tls"] if self.tls == Tls() else words

    def read_token(self) -> str | None:
        """The token, wherever it was given."""
        if self.token_file is None:
            return self.token
        if self.token:
            raise ConfigError("token: it is given twice; use one of --token and --token-file")
        try:
            return self.token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(f"token_file: {self.token_file} cannot be read: {why}") from None


HERE = Connection()
"""This machine's daemon, without a token."""


def _described_by(
    *,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
    token_file: TokenFile = None,
    tls: Encrypted = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_name: TlsName = None,
) -> Connection:
    """The connection of these options."""
    wanted = Tls(tls_ca, tls_cert, tls_key, tls_name)
    encrypted = tls or wanted != Tls()
    return Connection(address, token, token_file, wanted if encrypted else None)


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options above in place of its parameter of type `Connection`."""
    own = inspect.signature(command, eval_str=True)
    place = next(name for name, p in own.parameters.items() if p.annotation is Connection)
    added = inspect.signature(_described_by, eval_str=True).parameters
    kept = [p for name, p in own.parameters.items() if name != place]

    @functools.wraps(command)
    def run(**given: Any) -> None:  # noqa: ANN401 - whatever the command takes
        described = _described_by(**{name: given.pop(name) for name in added})
        command(**given, **{place: described})

    shown = own.replace(parameters=[*kept, *added.values()])
    run.__signature__ = shown  # type: ignore[attr-defined] # functions may have one
    run.__annotations__ = {name: p.annotation for name, p in shown.parameters.items()}
    return run


def ledger_file(state_dir: Path) -> Path:
    """The books."""
    return state_dir / "ledger.db"


def operator_token(token: str | None, state_dir: str | None) -> str:
    """The given token, or the one of this machine's daemon."""
    if token:
        return token
    from sage_fed.cli.serve import effective  # noqa: PLC0415 - pydantic takes half a second

    return admin_token(effective({"state_dir": state_dir}, None).settings.state_dir)


def admin_token(state_dir: Path) -> str:
    """The token that the running daemon wrote for operators of its machine."""
    path = state_dir / "admin.token"
    try:
        return read_trusted("admin token", path, owners_beside(path)).decode().strip()
    except OSError as error:
        raise ConfigError(
            f"admin token: {path} cannot be read ({error.strerror}); give --state-dir of the "
            "running daemon, or an admin's token in SAGE_FED_TOKEN"
        ) from None
