"""Exit codes of the command line, and how an error is told to a person or a program.

Owns: the one table from error class to exit code, and what to do next for each class.
Does not know: gRPC, rich, any command.
Fails: never; an unknown error is `ExitCode.ERROR`.
"""

from __future__ import annotations

import contextlib
import enum
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import typer

from sage_fed.cli.streams import complain
from sage_fed.core import SamplingRequest
from sage_fed.errors import (
    CannotAfford,
    CannotConnect,
    ConfigError,
    DeadlineInfeasible,
    DeviceBusy,
    DeviceOutOfMemory,
    Forbidden,
    InvalidField,
    LedgerDown,
    NoConnection,
    NoSuchAccount,
    Occupied,
    QueueFull,
    RateLimited,
    RequestIdConflict,
    Retryable,
    SageFedError,
    TierUnavailable,
    Unauthenticated,
)


class ExitCode(enum.IntEnum):
    """What a shell sees; the same for every command."""

    OK = 0
    ERROR = 1
    USAGE = 2
    REFUSED = 3
    UNAVAILABLE = 4
    CONFIG = 78
    """EX_CONFIG of sysexits.h, from `serve`: a service manager need not try again."""
    INTERRUPTED = 130
    PIPE_CLOSED = 141


class ConnectionBroke(CannotConnect):
    """The daemon was there, and was lost in the middle of an answer."""

    def __init__(self, address: str) -> None:
        super().__init__(address, f"the connection to {address} broke in mid-answer")


EXIT_CODES_HELP = (
    "Exit codes: 0 ok, 1 error, 2 usage or configuration (78 from serve), 3 refused by the budget, "
    "4 unavailable or cannot connect, 130 interrupted, 141 the output is not read."
)

# First match wins, so a subclass comes before its parent.
_TABLE: tuple[tuple[type[SageFedError], ExitCode, str], ...] = (
    (
        CannotAfford,
        ExitCode.REFUSED,
        "see `sage-fed quote` and `sage-fed budget`",
    ),
    (
        ConnectionBroke,
        ExitCode.UNAVAILABLE,
        "an unfinished job is not charged once the daemon restarts",
    ),
    (
        CannotConnect,
        ExitCode.UNAVAILABLE,
        "is the daemon running? start it with: sage-fed serve --profile demo",
    ),
    (QueueFull, ExitCode.UNAVAILABLE, ""),
    (RateLimited, ExitCode.UNAVAILABLE, ""),
    (LedgerDown, ExitCode.UNAVAILABLE, ""),
    (TierUnavailable, ExitCode.UNAVAILABLE, "see `sage-fed status`"),
    (DeviceBusy, ExitCode.UNAVAILABLE, ""),
    (InvalidField, ExitCode.USAGE, ""),
    (Occupied, ExitCode.ERROR, ""),
    (ConfigError, ExitCode.USAGE, "see `sage-fed config`"),
    (
        DeadlineInfeasible,
        ExitCode.ERROR,
        "allow more time with --deadline, or ask for fewer tokens",
    ),
    (RequestIdConflict, ExitCode.ERROR, "choose another --request-id"),
    (Unauthenticated, ExitCode.ERROR, "give a token with --token-file or SAGE_FED_TOKEN"),
    (Forbidden, ExitCode.ERROR, "this needs another role; give its token with SAGE_FED_TOKEN"),
    (NoSuchAccount, ExitCode.ERROR, "an operator creates it with `sage-fed admin set-budget`"),
    (DeviceOutOfMemory, ExitCode.ERROR, "ask for fewer tokens, or try again"),
)

_ENCRYPT = "encrypt: --tls-ca FILE of who signed its certificate, or --tls if this system trusts it"

# What to do about each cause, where that is not to start a daemon.
_CONNECT: Mapping[NoConnection, str] = MappingProxyType(
    {
        NoConnection.HUNG_UP: _ENCRYPT,
        NoConnection.PLAIN_TEXT: "leave out --tls and the --tls-... options and their variables",
        NoConnection.UNTRUSTED: "give --tls-ca FILE of who signed it; it may also have expired",
        NoConnection.OTHER_NAME: "use the address that it names, or give the name with --tls-name",
        NoConnection.CERTIFICATE_WANTED: "show one with --tls-cert and --tls-key",
        NoConnection.CERTIFICATE_REFUSED: "it has to be signed by one of the daemon's client_ca",
    }
)

_REFUSALS = (CannotAfford, QueueFull, RateLimited, TierUnavailable, DeadlineInfeasible, Forbidden)

# The option by which a person gave a field.
_OPTIONS = {
    **{
        name: f"--{name.replace('_', '-')}"
        for name in (
            "address", "allow_downgrade", "complexity", "tier", "tls", "tls_ca", "tls_cert",
            "tls_key", "token", *SamplingRequest.__slots__,
        )
    },
    "balance_uatp": "--balance",
    "capacity_uatp": "--capacity",
    "client_request_id": "--request-id",
    "deadline_s": "--deadline",
    "grace_s": "--grace",
    "max_cost_uatp": "--max-cost",
    "stop_token_ids": "--stop-token-id",
    "top_logprobs": "--logprobs",
}  # fmt: skip


def exit_code(error: SageFedError) -> ExitCode:
    """The code a command ends with after this error."""
    return _row(error)[0]


def daemon_exit_code(error: SageFedError) -> ExitCode:
    """The same for a daemon, whose manager starts it again unless it is told that this is vain."""
    vain = isinstance(error, ConfigError) and not isinstance(error, Occupied)
    return ExitCode.CONFIG if vain else exit_code(error)


def explain(error: SageFedError) -> str:
    """One readable line: what happened, then what to do next."""
    message = error.message
    if isinstance(error, InvalidField):
        message = f"{_option(error.field)}: {error.description}"
    message = as_options(message)
    parts = [f"{'refused' if isinstance(error, _REFUSALS) else 'error'}: {message}"]
    told = re.search(r"\bwait [\d.]+ s\b", message)
    if isinstance(error, Retryable) and error.retry_after_s is not None and not told:
        parts.append(f"retry after {max(error.retry_after_s, 0.1):.1f} s")
    return "; ".join(filter(None, (*parts, _advice(error))))


def as_options(sentence: str) -> str:
    """The daemon's sentence with the options of the command line instead of the wire's fields."""
    for name in ("max_cost_uatp", "allow_downgrade"):
        sentence = sentence.replace(name, _OPTIONS[name])
    return sentence


def _row(error: SageFedError) -> tuple[ExitCode, str]:
    """The error's exit code and what to do next."""
    rows = ((code, hint) for kind, code, hint in _TABLE if isinstance(error, kind))
    return next(rows, (ExitCode.ERROR, ""))


def _advice(error: SageFedError) -> str:
    """What to do next; "" where the error's own words say it."""
    if isinstance(error, CannotConnect) and error.cause in _CONNECT:
        return _CONNECT[error.cause]
    if "see `" in error.message:
        return ""
    return _row(error)[1]


def _option(field: str) -> str:
    """The option of a field such as `job.sampling.stop[1]`; others keep their path."""
    return _OPTIONS.get(field.rpartition(".")[2].partition("[")[0], field)


def error_object(error: SageFedError) -> dict[str, object]:
    """The error for `--json`: the reason code is stable, the message is for people."""
    body: dict[str, object] = {"reason": error.reason, "message": error.message}
    if isinstance(error, Retryable) and error.retry_after_s is not None:
        body["retry_after_s"] = error.retry_after_s
    if isinstance(error, InvalidField):
        body["field"] = error.field
    if isinstance(error, CannotAfford):
        body["detail"] = error.detail
    if isinstance(error, CannotConnect):
        body["cause"] = error.cause.value
    return {"error": body}


@contextlib.contextmanager
def reported(
    *,
    as_json: bool = False,
    codes: Callable[[SageFedError], ExitCode] = exit_code,
    tell: Callable[[str], None] = complain,
) -> Iterator[None]:
    """Turn the world's errors into one line on stderr and an exit code, never a traceback.

    With `as_json` stdout gets an object too, so that a program never parses a sentence.
    `tell` is who writes the line.
    """
    try:
        yield
    except SageFedError as error:
        if as_json:
            typer.echo(json.dumps(error_object(error)))
        tell(explain(error))
        raise typer.Exit(codes(error)) from None
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            typer.echo("\ninterrupted", err=True)
        raise typer.Exit(ExitCode.INTERRUPTED) from None
