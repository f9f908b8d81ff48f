"""Who may call while the daemon runs: the tokens file and the certificate, kept up to date.

Owns the looking at the files: a change holds within two seconds, without a restart. A file that
cannot be used changes nothing: what was in force stays, the log says what is wrong, and a metric
counts it.
Fails with `ConfigError` at the start only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from pathlib import Path

from sage_fed.auth import (
    Authenticator,
    Register,
    Throttle,
    Token,
    read_register,
    require_role,
)
from sage_fed.core import Role
from sage_fed.errors import ConfigError, Forbidden, LedgerDown, Unauthenticated
from sage_fed.metrics import Metrics, PageAccess
from sage_fed.service import LiveCertificate
from sage_fed.settings import Settings

WATCH_S = 0.5
"""How often the files are looked at. A change is taken over when two looks have seen the same, so
that a certificate is not read without the key that is written after it."""

OpenAccounts = Callable[[frozenset[str]], Awaitable[None]]
Signature = tuple[tuple[int, ...] | None, ...]

_log = logging.getLogger(__name__)


class Followed:
    """Files whose changes are noticed once they have come to rest; `look` is called at once."""

    def __init__(self, look: Callable[[], Signature]) -> None:
        self._look = look
        self._taken = self._last = look()

    async def changed(self) -> bool:
        """Look at them; whether there is something new, which two looks agree on."""
        last, self._last = self._last, await asyncio.to_thread(self._look)
        if last != self._last or self._last == self._taken:
            return False
        self._taken = self._last
        return True

    def forget(self) -> None:
        """Notice the last change once more: it could not be taken over now, and may be later."""
        self._taken = ()


class Access:
    """The authenticator and the certificate of a running daemon. Build it in a thread: it reads.

    Args:
        settings: where the files are.
        metrics: told of every change.

    Raises:
        ConfigError: a file cannot be used.
    """

    authenticator: Authenticator

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        tls = settings.tls
        # How the files look is noted before they are read.
        self._tokens = Followed(lambda: signature(settings.tokens_file))
        self._pems = Followed(lambda: signature(tls.certificate, tls.key, tls.client_ca))
        self.certificate = LiveCertificate(tls) if tls.certificate else None
        self._settings = settings
        self._metrics = metrics
        self._register = self._read_tokens()
        self._show_expiry()

    def accept(self, admin: Token, open_accounts: OpenAccounts) -> None:
        """Accept the callers that the files name, and the bearer of this machine's `admin` token.

        `open_accounts` gives new accounts their budgets, before their tokens hold.
        """
        self.authenticator = Authenticator.from_settings(self._settings, admin, self._register)
        self._open_accounts = open_accounts

    def page_access(self) -> PageAccess:
        """Return who may read the metrics: on this machine anyone, beyond it a monitor."""
        tls = self.certificate.page if self.certificate is not None else None
        if self._settings.metrics_listen.is_loopback:
            return PageAccess()
        if self._settings.metrics.public:
            return PageAccess(tls=tls)
        return PageAccess(self._admit_scrape, tls)

    def _describe(self) -> str:
        """Return in words who may call."""
        tokens = self.authenticator.num_tokens
        who = [f"{tokens} token{'s' * (tokens != 1)}"]
        if self.certificate is not None:
            who.append("clients with a certificate" * self.certificate.needs_clients)
        if (anonymous := self.authenticator.anonymous) is not None:
            who.append(f"this machine without a token, as {anonymous.account}")
        wire = "TLS" if self.certificate is not None else "plain text"
        return f"{', '.join(filter(None, who))}; {wire}"

    def announce(self) -> None:
        """Log who may call, and loudly where the operator lets tokens travel in plain text."""
        _log.info("let in: %s", self._describe())
        if self.certificate is None and not self._settings.listen.is_loopback:
            _log.warning(
                "tls.allow_plaintext: tokens and prompts on %s are readable to the network between",
                self._settings.listen,
            )

    async def run(self) -> None:
        """Follow the files until cancelled."""
        while True:
            await asyncio.sleep(WATCH_S)
            await self.refresh()

    async def refresh(self) -> None:
        """Take over what has changed since the last time."""
        if await self._tokens.changed():
            try:
                await self._reload("tokens", self._reload_tokens)
            except LedgerDown as down:
                # New accounts need a budget before their tokens hold. The ledger says in the log
                # what is the matter with it, and stops the daemon where that does not pass.
                self._tokens.forget()
                _log.debug("the tokens file waits for the ledger: %s", down.message)
        if await self._pems.changed():
            await self._reload("certificate", self._reload_certificate)

    async def _reload(self, file: str, reload: Callable[[], Awaitable[str]]) -> None:
        try:
            what = await reload()
        except ConfigError as error:
            self._metrics.reloaded(file, failed=True)
            _log.error("what was in force stays: %s", error.message)
            return
        self._metrics.reloaded(file)
        _log.info("%s", what)

    async def _reload_tokens(self) -> str:
        register = await asyncio.to_thread(self._read_tokens)
        if new := register.accounts - self.authenticator.accounts():
            await self._open_accounts(new)
        self.authenticator.use(register)
        return f"the tokens file has changed: {self._describe()}"

    async def _reload_certificate(self) -> str:
        assert self.certificate is not None
        await asyncio.to_thread(self.certificate.reload)
        self._show_expiry()
        return "the certificate has changed: new connections get it"

    def _read_tokens(self) -> Register:
        """Read the tokens file; where the settings name none, there may be none."""
        settings = self._settings
        optional = settings.auth.tokens_file is None
        return read_register(settings.tokens_file, settings.accounts, optional=optional)

    def _show_expiry(self) -> None:
        if self.certificate is not None:
            self._metrics.certificate_expires(self.certificate.expires_s)

    def _admit_scrape(self, authorization: Sequence[str]) -> HTTPStatus:
        if not authorization:
            return HTTPStatus.UNAUTHORIZED
        try:
            require_role(self.authenticator.caller(authorization), Role.MONITOR)
        except Unauthenticated:
            return HTTPStatus.UNAUTHORIZED
        except Forbidden:
            return HTTPStatus.FORBIDDEN
        return HTTPStatus.OK


def throttle_of(settings: Settings) -> Throttle | None:
    """Return what counts calls; None where no account has a limit."""
    named = [settings.account_rates(name) for name in settings.accounts]
    if not any(rates.requests_per_minute for rates in (settings.rate_limits, *named)):
        return None
    return Throttle(lambda name: settings.account_rates(name).requests_per_minute)


def signature(*paths: Path | None) -> Signature:
    """Return what tells changed files from those before; None for one that is not there."""
    found: list[tuple[int, ...] | None] = []
    for path in paths:
        try:
            stat = path.stat() if path is not None else None
        except OSError:
            stat = None
        known = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) if stat else None
        found.append(known)
    return tuple(found)
