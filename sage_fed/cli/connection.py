"""One command's conversation with the daemon: where it is, who asks, and over what.

Owns: the options that every such command has, once; opening and closing the client.
Does not know: what is asked, how it is shown.
Fails: the error tree, as the client raises it; `ConfigError` for a token that cannot be read.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from sage_fed.cli import options
from sage_fed.cli.paths import operator_token
from sage_fed.cli.streams import complain
from sage_fed.client import Client, Tls, leaves_machine
from sage_fed.environment import mistyped
from sage_fed.errors import ConfigError

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
    address: options.Address = DEFAULT_ADDRESS,
    token: options.Token = None,
    token_file: options.TokenFile = None,
    tls: options.Encrypted = False,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    tls_name: options.TlsName = None,
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
