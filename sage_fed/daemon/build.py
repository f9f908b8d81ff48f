"""From settings to parts: engines, tokenizers, books, cards, metrics, traces and the device.

Owns what of each part follows from the settings. Does not know when parts come and go.
Fails with `ConfigError`, `ModelLoadError`, `LedgerCorrupt`, `LedgerUnusable` or `Occupied`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import sage_fed
from sage_fed.calibrate.calibrator import Site
from sage_fed.cards.quality_card import QUALITY_FOLDER, QualityCard, readable_cards
from sage_fed.cards.rate_card import Fingerprint, RateCard, own_cards
from sage_fed.core import Address, ModelInfo, Phase, Tier, counted
from sage_fed.daemon.operations import CardInForce, QualityInForce
from sage_fed.daemon.readiness import Lifecycle
from sage_fed.device import TierSetup
from sage_fed.engine import DeviceDescription, Engine, EngineOptions, device_at_hand, load_engine
from sage_fed.errors import ConfigError, LedgerDown, Occupied, SageFedError
from sage_fed.ledger import AccountTerms, Ledger, LedgerOptions, Retention
from sage_fed.metrics import Metrics, MetricsServer, PageAccess
from sage_fed.model_files import resolve_model
from sage_fed.routing import possible_decisions
from sage_fed.settings import AUTO_CARD, NO_CARD, Settings, atp_from_uatp, uatp_from_atp
from sage_fed.text import Tokenizer, fingerprint, locate_tokenizer
from sage_fed.trusted_files import require_trusted_directory

if TYPE_CHECKING:
    from sage_fed.tracing import Tracing

_log = logging.getLogger(__name__)


async def load_tokenizers(settings: Settings) -> dict[Tier, Tokenizer]:
    """Load each tier's tokenizer, in a thread; equal ones are one object, so they work once.

    Raises:
        ConfigError: a directory that is not there.
        ModelLoadError: a checkpoint without a usable tokenizer.
    """
    return await asyncio.to_thread(_load_tokenizers, settings)


def _load_tokenizers(settings: Settings) -> dict[Tier, Tokenizer]:
    tokenizers: dict[Tier, Tokenizer] = {}
    by_files: dict[bytes, Tokenizer] = {}
    for tier in settings.tiers:
        directory = locate_tokenizer(_source(settings, tier), settings.tiers[tier].revision)
        # A pair's files are mostly equal: a large vocabulary takes half a second to read.
        seen = fingerprint(directory)
        tokenizer = by_files.get(seen) if seen else None
        if tokenizer is None:
            tokenizer = Tokenizer.load(directory)
            equal = (known for known in tokenizers.values() if known.encodes_like(tokenizer))
            tokenizer = next(equal, tokenizer)
        if seen:
            by_files[seen] = tokenizer
        tokenizers[tier] = tokenizer
    lowest = min(tokenizers)
    for tier, own in tokenizers.items():
        if not own.has_tokens_of(tokenizers[lowest]):
            _log.warning(
                "the %s tier's tokenizer is not the %s tier's: that one drafts nothing for it, and "
                "there are no cascades; name two models of one tokenizer for both",
                tier.name,
                lowest.name,
            )
    return tokenizers


def tier_setup(settings: Settings, tier: Tier, tokenizer: Tokenizer) -> TierSetup:
    """Return how the executor gets this tier's engine, and how much it may take on."""
    own = settings.tiers[tier]
    options = EngineOptions(
        model=str(_source(settings, tier)),
        kv_cache_bytes=own.kv_cache_bytes,
        device=settings.device,
        precision=own.precision,
        revision=own.revision or "",
        name=own.display_name,
        max_context_tokens=own.max_context_tokens,
        num_valid_ids=tokenizer.num_valid_ids,
        unknown_ids=tokenizer.unknown_ids,
        end_token_ids=tokenizer.end_token_ids,
        kernels=settings.kernels,
        weights_cache=settings.weights_cache,
        weights_cache_bytes=settings.weights_cache_bytes,
        max_batch=own.max_batch,
    )

    def load(progress: Callable[[float], None]) -> Engine:
        return load_engine(options, progress)

    return TierSetup(
        load=load,
        max_batch=own.max_batch,
        max_waiting=own.max_waiting,
        prefill_chunk_tokens=own.prefill_chunk_tokens,
        prefix_cache=own.prefix_cache,
        kv_overcommit=own.kv_overcommit,
    )


def _source(settings: Settings, tier: Tier) -> str | Path:
    """Return where a tier's files are: an absolute directory that is there, or a hub id.

    Raises:
        ConfigError: there is no such directory; the hub is not asked for a mistyped path.
    """
    source = resolve_model(settings.tiers[tier].model)
    if isinstance(source, Path):
        source = source.absolute()
        if not source.is_dir():
            raise ConfigError(f"{tier.name}.model: there is no directory {source}")
    return source


def build_metrics(settings: Settings) -> Metrics:
    """Return every series, with what is known before anything runs."""
    tiers = tuple(settings.tiers)
    metrics = Metrics(
        tiers=tiers,
        version=sage_fed.__version__,
        decisions=possible_decisions(tiers),
        per_account_balance=settings.metrics.per_account_balance,
    )
    published = RateCard.load(tiers=tiers)
    metrics.cost_ratios("configured", {phase: published.cost_ratio(phase) for phase in Phase})
    return metrics


def start_watching(
    settings: Settings, device: DeviceDescription, metrics: Metrics, stack: AsyncExitStack
) -> Tracing | None:
    """Read the device's power, and trace if an endpoint is set, until the stack unwinds.

    Entered first, so that what everything else says in its last moments is still exported.
    """
    stack.enter_context(metrics.watch_power(device.gpu_uuid))
    if settings.tracing.otlp_endpoint is None:
        return None
    try:
        # Only now: importing OpenTelemetry takes a tenth of a second.
        from sage_fed.tracing import start_tracing  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(
            "tracing.otlp_endpoint: OpenTelemetry is not installed; "
            "install sage-fed with its extra: sage-fed[otel]"
        ) from error
    return stack.enter_context(
        start_tracing(
            settings.tracing.otlp_endpoint,
            sample_ratio=settings.tracing.sample_ratio,
            version=sage_fed.__version__,
            models={tier: own.display_name for tier, own in settings.tiers.items()},
        )
    )


def expose(metrics: Metrics, listen: Address, access: PageAccess) -> MetricsServer:
    """Serve the page until it is closed; `Occupied` where the address cannot be had."""
    try:
        return metrics.serve(listen.host, listen.port, access)
    except OSError as error:
        raise Occupied(f"metrics_listen: cannot bind {listen}: {error.strerror}") from None


def page_url(bound: Address, access: PageAccess) -> str:
    """Where a person or a scraper finds the page."""
    return f"{'http' if access.tls is None else 'https'}://{bound}/metrics"


async def open_ledger(
    settings: Settings, metrics: Metrics, lifecycle: Lifecycle, accepts: Callable[[bool], None]
) -> Ledger:
    """Open the books in the state directory; should they fail later, the daemon stops.

    `accepts` is told when they begin or cease to take entries.
    """

    def on_disk(writable: bool) -> None:
        metrics.ledger_writable(writable=writable)
        accepts(writable)

    ledger = await Ledger(
        settings.state_dir / "ledger.db",
        options=LedgerOptions(
            retention=Retention(
                keep_s=settings.ledger.result_retention_s,
                entries_s=settings.ledger.entry_retention_s,
            ),
            account_reads=settings.ledger.account_reads,
            commit_timeout_s=settings.ledger.commit_timeout_s,
        ),
        terms=lambda account: _terms(settings, account),
        on_commit=metrics.ledger_committed,
        on_read=metrics.ledger_read,
        on_fold=metrics.ledger_folded,
        on_disk=on_disk,
        on_death=lambda error: lifecycle.fail(f"the ledger failed: {_words(error)}"),
    ).open()
    recovery = ledger.recovery
    metrics.ledger_recovered(recovery.voided_jobs, recovery.voided_uatp)
    if recovery.voided_jobs:
        _log.warning(
            "the daemon before this one did not end %s: %s ATP were given back, nothing charged",
            counted(recovery.voided_jobs, "job"),
            f"{atp_from_uatp(recovery.voided_uatp):f}",
        )
    return ledger


async def open_accounts(ledger: Ledger, settings: Settings, accounts: Collection[str]) -> None:
    """See that these accounts exist, on the terms that the settings give them now."""
    try:
        for account in sorted(accounts):
            await ledger.ensure_account(account, _terms(settings, account))
    except LedgerDown as down:
        # A client is only told that it is down; the operator has to know why.
        if isinstance(down.__cause__, SageFedError):
            raise down.__cause__ from None
        raise


def _words(error: BaseException) -> str:
    return error.message if isinstance(error, SageFedError) else f"{error!r}; see the log"


def _terms(settings: Settings, account: str) -> AccountTerms:
    budget = settings.account_budget(account)
    return AccountTerms(
        capacity_uatp=uatp_from_atp(budget.capacity_atp),
        refill_uatp_per_s=uatp_from_atp(budget.refill_atp_per_s),
        strategic_floor_uatp=uatp_from_atp(budget.strategic_floor_atp),
        initial_uatp=uatp_from_atp(budget.initial_atp),
    )


def on_device_at_hand(settings: Settings, metrics: Metrics) -> tuple[Settings, str]:
    """Return the settings with the device that serves, and why it is not the one wanted."""
    why = ""
    if settings.device == "auto":
        device, why = device_at_hand()
        settings = settings.model_copy(update={"device": device})
    metrics.device_fallback(fallen_back=bool(why))
    if why:
        _log.warning(
            "%s: serving from the CPU, many times slower; device = 'cpu' if that is what you want",
            why,
        )
    return settings, why


def cards_in_force(
    settings: Settings, device: DeviceDescription, metrics: Metrics
) -> tuple[CardInForce, QualityInForce]:
    """Read the cards that the settings name, and with `AUTO_CARD` those to choose from; blocks.

    Raises:
        ConfigError: a named card is not there or cannot be read, or another user may put cards
            into the operator's directory.
    """
    require_trusted_directory("cards_dir", settings.own_cards_dir)
    tiers = tuple(settings.tiers)
    own: tuple[RateCard, ...] = ()
    if settings.rate_card == AUTO_CARD:
        card = RateCard.load(tiers=tiers)
        own, errors = own_cards(settings.own_cards_dir, tiers)
        for error in errors:
            _log.warning("a rate card is passed over: %s", error.message)
    else:
        card = RateCard.load(settings.rate_card, settings.own_cards_dir, tiers)

    def fingerprint(models: Mapping[Tier, ModelInfo]) -> Fingerprint:
        return Fingerprint.of(device.name, device.threads, sage_fed.__version__, models)

    return (
        CardInForce(settings.rate_card, card, own, fingerprint, metrics),
        _quality_in_force(settings, metrics),
    )


def _quality_in_force(settings: Settings, metrics: Metrics) -> QualityInForce:
    tiers, wanted = tuple(settings.tiers), settings.quality_card
    cards: tuple[QualityCard, ...] = ()
    num_own = 0
    require_trusted_directory("cards_dir", settings.own_cards_dir / QUALITY_FOLDER)
    if wanted == AUTO_CARD:
        own, bundled, errors = readable_cards(settings.own_cards_dir, tiers)
        for error in errors:
            _log.warning("a quality card is passed over: %s", error.message)
        cards, num_own = (*own, *bundled), len(own)
    elif wanted != NO_CARD:
        cards = (QualityCard.load(wanted, settings.own_cards_dir, tiers),)
    return QualityInForce(
        cards, metrics, num_own=num_own, num_tiers=len(tiers), auto=wanted == AUTO_CARD
    )


def site_of(settings: Settings, device: DeviceDescription, bandwidth: float) -> Site:
    """Return what a calibration is told of this daemon."""
    _, _, index = settings.device.partition("cuda:")
    tiers = {
        f"{tier.name}.{key}": str(getattr(own, key))
        for tier, own in settings.tiers.items()
        for key in ("kv_cache_bytes", "max_context_tokens", "max_batch", "prefill_chunk_tokens")
    }
    return Site(
        device=device.name,
        threads=device.threads,
        version=sage_fed.__version__,
        cuda_index=int(index) if index else None,
        read_bandwidth_bytes_per_s=bandwidth,
        settings={"device": settings.device, "cpu_threads": str(settings.cpu_threads), **tiers},
        cards_dir=settings.own_cards_dir,
        tiers=tuple(settings.tiers),
    )
