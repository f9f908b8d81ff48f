"""The calls: method, request and how its reply is read. One list, apart from how they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message as ProtoMessage

from sage_fed import core
from sage_fed.client import replies, reports
from sage_fed.client.answers import Answer, EntryPage, LoadReport, TokenCount
from sage_fed.client.requests import TierName, chat_of, filled, prompt_of, tier_of
from sage_fed.ledger.entries import BudgetChange
from sage_fed.v1 import admin_pb2, budget_pb2, inference_pb2, model_pb2, types_pb2

T = TypeVar("T")

_INFERENCE = "/sage_fed.v1.InferenceService/"
_BUDGET = "/sage_fed.v1.BudgetService/"
_MODEL = "/sage_fed.v1.ModelService/"
_ADMIN = "/sage_fed.v1.AdminService/"


@dataclass(frozen=True, slots=True)
class Ask(Generic[T]):
    """One call: full method name, request, reply class, and the reply's meaning.

    A job lasts as long as it lasts; every other call is `timed` by the client's own deadline.
    """

    method: str
    request: ProtoMessage
    reply: type[Any]
    read: Callable[[Any], T]
    timed: bool = True


def stream(job: types_pb2.JobSpec) -> Ask[core.Event]:
    """Run a job; one reply an event."""
    request = inference_pb2.GenerateStreamRequest(job=job)
    reply = inference_pb2.GenerateStreamResponse
    return Ask(f"{_INFERENCE}GenerateStream", request, reply, replies.event_of, timed=False)


def generate(job: types_pb2.JobSpec) -> Ask[Answer]:
    """Run a job and wait for its whole answer."""
    request = inference_pb2.GenerateRequest(job=job)
    reply = inference_pb2.GenerateResponse
    return Ask(f"{_INFERENCE}Generate", request, reply, replies.answer_of, timed=False)


def quote(job: types_pb2.JobSpec) -> Ask[core.Quote]:
    """Ask what a job would cost."""
    request = inference_pb2.QuoteRequest(job=job)
    return Ask(f"{_INFERENCE}Quote", request, inference_pb2.QuoteResponse, replies.quote_of)


def count_tokens(
    prompt: str | Sequence[core.Message], tier: core.Tier | TierName
) -> Ask[TokenCount]:
    """Count a prompt's tokens."""
    request = inference_pb2.CountTokensRequest(tier=tier_of(tier, "tier"))
    if isinstance(prompt, str):
        filled(request, text=prompt)
    else:
        request.chat.CopyFrom(chat_of(prompt_of(prompt).messages, "chat"))
    reply = inference_pb2.CountTokensResponse
    return Ask(f"{_INFERENCE}CountTokens", request, reply, replies.count_of)


def budget() -> Ask[core.Budget]:
    """Read the caller's own books."""
    request = budget_pb2.GetBudgetRequest()

    def read(reply: budget_pb2.GetBudgetResponse) -> core.Budget:
        return replies.budget_of(reply.budget)

    return Ask(f"{_BUDGET}GetBudget", request, budget_pb2.GetBudgetResponse, read)


def entries(page_size: int, page_token: str) -> Ask[EntryPage]:
    """Read a page of the caller's own ledger."""
    request = filled(budget_pb2.ListEntriesRequest(), page_size=page_size, page_token=page_token)
    return Ask(f"{_BUDGET}ListEntries", request, budget_pb2.ListEntriesResponse, replies.page_of)


def models() -> Ask[tuple[core.ModelStatus, ...]]:
    """List both tiers' models."""
    request = model_pb2.ListModelsRequest()

    def read(reply: model_pb2.ListModelsResponse) -> tuple[core.ModelStatus, ...]:
        return tuple(reports.model_of(model) for model in reply.models)

    return Ask(f"{_MODEL}ListModels", request, model_pb2.ListModelsResponse, read)


def status() -> Ask[core.DaemonStatus]:
    """Read the daemon at a glance."""
    request = model_pb2.GetStatusRequest()
    return Ask(f"{_MODEL}GetStatus", request, model_pb2.GetStatusResponse, reports.status_of)


def abort(job_id: str) -> Ask[bool]:
    """End a job."""
    request = filled(admin_pb2.AbortRequest(), job_id=job_id)

    def read(reply: admin_pb2.AbortResponse) -> bool:
        return reply.aborted

    return Ask(f"{_ADMIN}Abort", request, admin_pb2.AbortResponse, read)


def end_call(call_id: str) -> Ask[bool]:
    """End a call whose reply nobody reads."""
    return replace(abort(""), request=admin_pb2.AbortRequest(call_id=call_id))


def close_connection(connection: str) -> Ask[bool]:
    """Close a connection, with all that it carries."""
    return replace(abort(""), request=admin_pb2.AbortRequest(connection=connection))


def drain(grace_s: float | None) -> Ask[int]:
    """Stop the daemon, softly."""
    request = filled(admin_pb2.DrainRequest(), grace_s=grace_s)

    def read(reply: admin_pb2.DrainResponse) -> int:
        return reply.jobs_running

    return Ask(f"{_ADMIN}Drain", request, admin_pb2.DrainResponse, read)


def set_budget(account: str, change: BudgetChange) -> Ask[core.Budget]:
    """Create or change an account."""
    request = filled(
        admin_pb2.SetBudgetRequest(),
        account=account,
        balance_uatp=change.balance_uatp,
        capacity_uatp=change.capacity_uatp,
        refill_uatp_per_s=change.refill_uatp_per_s,
        strategic_floor_uatp=change.strategic_floor_uatp,
    )

    def read(reply: admin_pb2.SetBudgetResponse) -> core.Budget:
        return replies.budget_of(reply.budget)

    return Ask(f"{_ADMIN}SetBudget", request, admin_pb2.SetBudgetResponse, read)


def load() -> Ask[LoadReport]:
    """Read what runs and waits now."""
    request = admin_pb2.GetLoadRequest()
    return Ask(f"{_ADMIN}GetLoad", request, admin_pb2.GetLoadResponse, reports.load_of)


def calibrate(*, quick: bool, adopt: bool) -> Ask[core.CalibrationEvent]:
    """Measure the engines; one reply an event."""
    request = admin_pb2.CalibrateRequest(quick=quick, adopt=adopt)
    reply = admin_pb2.CalibrateResponse
    return Ask(f"{_ADMIN}Calibrate", request, reply, reports.calibration_of, timed=False)


def adopt_card(version: str) -> Ask[core.CardStatus]:
    """Put a card in force."""
    request = filled(admin_pb2.AdoptRateCardRequest(), version=version)
    reply = admin_pb2.AdoptRateCardResponse
    return Ask(f"{_ADMIN}AdoptRateCard", request, reply, reports.card_status_of)
