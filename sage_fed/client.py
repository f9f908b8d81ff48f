"""The Python client: a running daemon as typed calls, for scripts and notebooks.

`Client` takes and gives core's frozen values, as if the daemon were a library. It owns one channel;
use it as a context manager. It blocks: not for an event loop.
Nothing that travels is checked here: the daemon is the judge.
Every method raises the error tree: `InvalidField` (also, before anything is sent, for what protobuf
cannot carry, by the daemon's name of the field), `CannotAfford`, ..., `CannotConnect` where no
daemon answers, `CallFailed` for a status that is none of ours. A keyword that does not exist is a
`TypeError`.
gRPC's texts about connections are no interface: one that is not known has the cause `UNKNOWN`, and
the tests make each of the others with real servers.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar, Unpack, cast

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from sage_fed.core import (
    TIER_ROLES,
    Address,
    Answer,
    Budget,
    BudgetChange,
    CalibrationEvent,
    CardStatus,
    DaemonStatus,
    Day,
    Entry,
    EntryPage,
    Event,
    JobFields,
    JobSpec,
    LoadReport,
    Message,
    Mode,
    ModelStatus,
    ModeReturns,
    Priority,
    Prompt,
    QualityCardStatus,
    Quote,
    SamplingRequest,
    Tier,
    TierName,
    TokenCount,
    UnixSocket,
    parse_listen,
)
from sage_fed.errors import CallFailed, CannotConnect, InvalidField, NoConnection, SageFedError
from sage_fed.v1 import admin_pb2, budget_pb2, inference_pb2, model_pb2, types_pb2
from sage_fed.wire import error_status
from sage_fed.wire.codec import build, decode, decoder, encode

__all__ = [
    "Answer",
    "Client",
    "EntryPage",
    "JobFields",
    "LoadReport",
    "Tls",
    "TokenCount",
    "leaves_machine",
    "wait_serving",
]

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 30.0
"""For calls that are not a job."""

MAX_PAGE_SIZE = 1000
"""The most entries that the daemon gives at once."""

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].methods_by_name
_BUDGET = budget_pb2.DESCRIPTOR.services_by_name["BudgetService"].methods_by_name
_MODEL = model_pb2.DESCRIPTOR.services_by_name["ModelService"].methods_by_name
_ADMIN = admin_pb2.DESCRIPTOR.services_by_name["AdminService"].methods_by_name


class Client:
    """A daemon at `address` (HOST:PORT or unix:/PATH), called as the bearer of `token`.

    With `tls` the connection is encrypted, and the daemon has to prove who it is.
    """

    def __init__(
        self,
        address: str,
        token: str | None = None,
        *,
        tls: Tls | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._address = address
        self._metadata = metadata_of(token)
        self._tls = tls
        self._timeout_s = timeout_s
        self._channel = open_channel(address, tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; running streams are cancelled."""
        self._channel.close()

    def stream(
        self, prompt: PromptLike, **fields: Unpack[JobFields]
    ) -> Generator[Event, None, None]:
        """Run a job and yield its events; leaving the loop early cancels the job."""
        job = job_of(prompt, **fields)
        request = inference_pb2.GenerateStreamRequest(job=job)
        return self._stream(_INFERENCE["GenerateStream"], request, Event)

    def generate(self, prompt: PromptLike, **fields: Unpack[JobFields]) -> Answer:
        """Run a job and return its whole answer."""
        request = inference_pb2.GenerateRequest(job=job_of(prompt, **fields))
        # A job lasts as long as it lasts.
        return decode(Answer, self._ask(_INFERENCE["Generate"], request, timed=False))

    def quote(self, prompt: PromptLike, **fields: Unpack[JobFields]) -> Quote:
        """Return what the job would cost at most and which route it would take."""
        request = inference_pb2.QuoteRequest(job=job_of(prompt, **fields))
        return decode(Quote, self._ask(_INFERENCE["Quote"], request))

    def count_tokens(
        self, prompt: str | Sequence[Message], tier: Tier | TierName = Tier.TACTICAL
    ) -> TokenCount:
        """Return the prompt's tokens as the tier's model would see them."""
        spec = JobSpec("", prompt_of(prompt), tier_of(tier, "tier"))
        request = encode(spec, inference_pb2.CountTokensRequest)
        if isinstance(prompt, str):
            request.text = prompt
        return decode(TokenCount, self._ask(_INFERENCE["CountTokens"], request))

    def budget(self) -> Budget:
        """Return the caller's own books."""
        reply = self._ask(_BUDGET["GetBudget"], budget_pb2.GetBudgetRequest())
        return decode(Budget, reply.budget)

    def entries_page(self, page_size: int = 50, page_token: str = "") -> EntryPage:
        """Return one page of the caller's own ledger, newest first."""
        request = build(budget_pb2.ListEntriesRequest, page_size=page_size, page_token=page_token)
        return decode(EntryPage, self._ask(_BUDGET["ListEntries"], request))

    def entries(self, limit: int = 50) -> tuple[Entry, ...]:
        """Return the newest `limit` entries of the caller's own ledger, newest first."""
        return self.books(limit).entries

    def books(self, limit: int = 50) -> EntryPage:
        """Return the newest `limit` lines of the caller's own ledger, newest first.

        Entries, and where there are fewer of them, days that stand for older ones.
        """
        entries: list[Entry] = []
        days: list[Day] = []
        token = ""
        while (left := limit - len(entries) - len(days)) > 0:
            page = self.entries_page(min(left, MAX_PAGE_SIZE), token)
            entries += page.entries
            days += page.days
            token = page.next_page_token
            if not token:
                break
        return EntryPage(tuple(entries), token, tuple(days))

    def models(self) -> tuple[ModelStatus, ...]:
        """Return the tiers' models."""
        reply = self._ask(_MODEL["ListModels"], model_pb2.ListModelsRequest())
        return tuple(decode(ModelStatus, model) for model in reply.models)

    def status(self) -> DaemonStatus:
        """Return the daemon at a glance."""
        return decode(DaemonStatus, self._ask(_MODEL["GetStatus"], model_pb2.GetStatusRequest()))

    def compare_modes(self, *, task_class: str = "", max_error: float | None = None) -> ModeReturns:
        """Return what an answer costs in each mode, and how often it is right."""
        request = build(model_pb2.CompareModesRequest, task_class=task_class, max_error=max_error)
        return decode(ModeReturns, self._ask(_MODEL["CompareModes"], request))

    def abort(self, job_id: str) -> bool:
        """End a job of any account (admins only); False where no such job runs."""
        return self._end(job_id=job_id)

    def end_call(self, call_id: str) -> bool:
        """End a call of `load().unread` (admins only); False where there is none of that id."""
        return self._end(call_id=call_id)

    def close_connection(self, connection: str) -> bool:
        """Close a connection of `load().unread` (admins only); False where there is none."""
        return self._end(connection=connection)

    def _end(self, **name: str) -> bool:
        return bool(self._ask(_ADMIN["Abort"], build(admin_pb2.AbortRequest, **name)).aborted)

    def drain(self, grace_s: float | None = None) -> int:
        """Stop the daemon when its jobs have ended (admins only); how many still run."""
        request = build(admin_pb2.DrainRequest, grace_s=grace_s)
        return int(self._ask(_ADMIN["Drain"], request).jobs_running)

    def set_budget(
        self,
        account: str,
        *,
        balance_uatp: int | None = None,
        capacity_uatp: int | None = None,
        refill_uatp_per_s: int | None = None,
        strategic_floor_uatp: int | None = None,
    ) -> Budget:
        """Create or change an account (admins only); None stays as it is."""
        change = BudgetChange(balance_uatp, capacity_uatp, refill_uatp_per_s, strategic_floor_uatp)
        request = encode(change, admin_pb2.SetBudgetRequest, account=account)
        return decode(Budget, self._ask(_ADMIN["SetBudget"], request).budget)

    def load(self) -> LoadReport:
        """Return what runs and waits now (admins only)."""
        return decode(LoadReport, self._ask(_ADMIN["GetLoad"], admin_pb2.GetLoadRequest()))

    def calibrate(
        self, *, quick: bool = False, adopt: bool = False
    ) -> Generator[CalibrationEvent, None, None]:
        """Measure the engines and write a rate card (admins only): progress, then the result.

        Leaving the loop early ends the calibration without a trace.
        """
        request = admin_pb2.CalibrateRequest(quick=quick, adopt=adopt)
        return self._stream(_ADMIN["Calibrate"], request, CalibrationEvent)

    def adopt_card(self, version: str) -> CardStatus:
        """Put a rate card in force for new jobs, until the daemon restarts (admins only)."""
        request = build(admin_pb2.AdoptRateCardRequest, version=version)
        return decode(CardStatus, self._ask(_ADMIN["AdoptRateCard"], request))

    def adopt_quality_card(self, version: str) -> QualityCardStatus:
        """Put a quality card in force, until the daemon restarts (admins only)."""
        request = build(admin_pb2.AdoptQualityCardRequest, version=version)
        return decode(QualityCardStatus, self._ask(_ADMIN["AdoptQualityCard"], request))

    def _ask(self, method: MethodDescriptor, request: ProtoMessage, *, timed: bool = True) -> Any:  # noqa: ANN401 - the method's reply
        call = self._channel.unary_unary(*_form(method))
        timeout_s = self._timeout_s if timed else None
        try:
            return call(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error, self._address, self._tls) from None

    def _stream(
        self, method: MethodDescriptor, request: ProtoMessage, kind: object
    ) -> Generator[Any, None, None]:
        read = decoder(kind, method.output_type)
        call = self._channel.unary_stream(*_form(method))(request, metadata=self._metadata)
        try:
            for event in call:
                yield read(event)
        except grpc.RpcError as error:
            raise error_of(error, self._address, self._tls) from None
        finally:
            call.cancel()  # type: ignore[no-untyped-call] # the stubs forgot its types


def _form(method: MethodDescriptor) -> tuple[str, Callable[[Any], bytes], Callable[[bytes], Any]]:
    """Return a method's path, and how its request is written and its reply read."""
    request, reply = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    path = f"/{method.containing_service.full_name}/{method.name}"
    return path, request.SerializeToString, reply.FromString


_TIERS = {"auto": None} | {tier.name: tier for tier in TIER_ROLES}
_MODES = {mode.value: mode for mode in Mode}
_PRIORITIES = {priority.name.lower(): priority for priority in Priority}
_SAMPLING = frozenset(field.name for field in fields(SamplingRequest))

PromptLike = JobSpec | Prompt | Sequence[Message] | str
"""A whole job, a prompt, a conversation, or one user turn."""


def job_of(prompt: PromptLike, **given: Unpack[JobFields]) -> types_pb2.JobSpec:
    """Return the message for a job; keyword arguments go with a prompt, not with a JobSpec.

    Raises:
        TypeError: a keyword that no job has, keywords beside a JobSpec, or what is no prompt, or no
            sequence of token ids.
        InvalidField: a value that protobuf cannot carry, or a word that names nothing.
    """
    _require_known(given)
    if not isinstance(prompt, JobSpec):
        named: dict[str, Any] = {"requested" if k == "tier" else k: v for k, v in given.items()}
        sampling = {name: named.pop(name) for name in _SAMPLING & named.keys()}
        spec = JobSpec("", prompt_of(prompt), sampling=SamplingRequest(**sampling), **named)
    elif given:
        raise TypeError(f"a JobSpec already says everything; put {', '.join(given)} into it")
    else:
        spec = prompt
    spec = replace(
        spec,
        requested=tier_of(spec.requested, "job.tier"),
        priority=_priority(spec.priority),
        mode=_mode(spec.mode),
        sampling=replace(
            spec.sampling,
            stop=_stop_strings(spec.sampling.stop),
            stop_token_ids=_stop_token_ids(spec.sampling.stop_token_ids),
        ),
    )
    # The account is not sent: the daemon knows it from the token.
    return encode(spec, types_pb2.JobSpec, "job")


def _mode(mode: object) -> Mode | None:
    """Return a mode, which may be given by its name; None is the daemon's choice.

    Raises:
        InvalidField: it is none.
    """
    return mode if mode is None or isinstance(mode, Mode) else _meaning(_MODES, mode, "job.mode")


def prompt_of(prompt: object) -> Prompt:
    """Return what a `PromptLike` other than a whole job says.

    Raises:
        TypeError: it is none.
    """
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return Prompt(messages=(Message("user", prompt),))
    turns = tuple(prompt) if isinstance(prompt, Sequence) else (None,)
    if not all(isinstance(turn, Message) for turn in turns):
        raise TypeError("a prompt is a JobSpec, a Prompt, a sequence of Message or a str")
    return Prompt(messages=turns)


def tier_of(tier: Tier | str | None, field: str) -> Tier | None:
    """Return the tier that a word names, None for AUTO; `field` is its name in the request."""
    if tier is None or isinstance(tier, Tier):
        return tier
    return _meaning(_TIERS, tier, field)


def _require_known(given: Iterable[str]) -> None:
    """Raise the error of Python's own calls for a keyword that `JobFields` does not have."""
    names = JobFields.__annotations__
    for name in given:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            advice = f"did you mean '{close[0]}'?" if close else f"a job has {', '.join(names)}"
            if "max_cost_uatp" in close:
                advice += " It is in micro-ATP: 5 ATP is 5_000_000"
            raise TypeError(f"got an unexpected keyword argument '{name}'; {advice}")


def _stop_strings(stop: object) -> tuple[str, ...]:
    """Return the strings; a lone one is not taken apart into its letters."""
    if isinstance(stop, str):
        return (stop,)
    if stop is None:
        return ()
    if not isinstance(stop, Sequence):
        raise InvalidField("job.sampling.stop", "must be a sequence of strings")
    return tuple(stop)


def _stop_token_ids(ids: object) -> tuple[int, ...]:
    if ids is None:
        return ()
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise TypeError(f"stop_token_ids is a sequence of token ids, such as (17,), not {ids!r}")
    return tuple(ids)


def _priority(priority: Priority | str | int) -> Priority:
    if priority in tuple(Priority):
        return Priority(priority)
    return _meaning(_PRIORITIES, priority, "job.priority")


def _meaning(words: Mapping[str, T], word: object, field: str) -> T:
    if not isinstance(word, str) or word not in words:
        raise InvalidField(field, f"must be one of {', '.join(words)}, not {word!r}")
    return words[word]


OPTIONS: tuple[tuple[str, int], ...] = (
    # A whole answer with log-probabilities is larger than gRPC's default of 4 MiB.
    ("grpc.max_receive_message_length", 64 * 2**20),
    # A daemon on this machine or this network is not reached through a web proxy.
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, slots=True)
class Tls:
    """How a daemon that speaks TLS is trusted, and what it is shown. Files in PEM.

    Attributes:
        ca: who may have signed the daemon's certificate; None is whom this system trusts.
        certificate: what the client shows, where the daemon asks for it; with `key`.
        key: its private key.
        name: the name in the daemon's certificate, where that is not the address's host.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    name: str | None = None


def open_channel(address: str, tls: Tls | None = None) -> grpc.Channel:
    """Return a channel to HOST:PORT or unix:/PATH; it connects with the first call.

    Raises:
        InvalidField: `address` is neither, or a file cannot be read.
    """
    place = _place(address)
    if tls is None:
        return grpc.insecure_channel(str(place), options=OPTIONS)
    if isinstance(place, UnixSocket):
        raise InvalidField("tls", "a Unix socket speaks plain text; use it without")
    named = (("grpc.ssl_target_name_override", tls.name),) if tls.name else ()
    return grpc.secure_channel(str(place), _credentials(tls), options=(*OPTIONS, *named))


def _place(address: str) -> Address | UnixSocket:
    with contextlib.suppress(ValueError):
        place = parse_listen(address)
        if isinstance(place, UnixSocket) or place.port:
            return place
    raise InvalidField(
        "address",
        f"must be HOST:PORT, such as 127.0.0.1:6590 or [::1]:6590, or unix:/PATH, not {address!r}",
    )


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    if (tls.certificate is None) != (tls.key is None):
        missing = "tls_key" if tls.key is None else "tls_cert"
        raise InvalidField(missing, "a client certificate and its key come together")
    return grpc.ssl_channel_credentials(
        root_certificates=_read("tls_ca", tls.ca),
        private_key=_read("tls_key", tls.key),
        certificate_chain=_read("tls_cert", tls.certificate),
    )


def _read(field: str, path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise InvalidField(field, f"{path} cannot be read: {error.strerror}") from None


def leaves_machine(address: str) -> bool:
    """Return whether what is sent to the address can be seen by others; an unknown name's can.

    Raises:
        InvalidField: it is no address.
    """
    return not _place(address).is_loopback


def metadata_of(token: str | None) -> tuple[tuple[str, str], ...]:
    """Return the headers that say who calls.

    Raises:
        InvalidField: the token cannot be a header; the text does not repeat it.
    """
    if token is None:
        return ()
    if not re.fullmatch("[!-~]+", token):
        raise InvalidField("token", "must be printable ASCII without spaces")
    return (("authorization", f"Bearer {token}"),)


def wait_serving(address: str, service: str, timeout_s: float) -> bool:
    """Wait until `service` is SERVING; False where it is not in time.

    Raises:
        SageFedError: the server refused the question.
    """
    with open_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=service), timeout=timeout_s, wait_for_ready=True
        )
        try:
            return any(reply.status == health_pb2.HealthCheckResponse.SERVING for reply in watch)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return False
            raise error_of(error, address) from None
        finally:
            watch.cancel()


def error_of(error: grpc.RpcError, address: str, tls: Tls | None = None) -> SageFedError:
    """Return the error that the daemon meant; `address` is where, and `tls` how it was asked."""
    # Every RpcError that a channel raises is also its Call; grpc's own types do not say so.
    call = cast("grpc.Call", error)
    code = call.code()
    message = call.details() or ""
    try:
        status = rpc_status.from_call(call)
        known = error_status.error_of(message, status.details) if status is not None else None
    except (ValueError, DecodeError):  # what is not readable is not the daemon's
        known = None
    if known is not None:
        return known
    if code is grpc.StatusCode.UNAVAILABLE:
        cause = _cause(message, tls)
        why = _WORDS.get(cause)
        return CannotConnect(
            address, f"cannot connect to {address}: {why}" if why else None, cause=cause
        )
    return CallFailed(message or code.name.lower(), status=code.name)


_NEVER_MADE = "failed to connect to all addresses"
"""How gRPC begins where there never was a connection; one that broke has no such words."""

_TEXTS = (
    ("Connection refused", NoConnection.REFUSED),
    ("No such file or directory", NoConnection.REFUSED),
    ("Hostname Verification Check failed", NoConnection.OTHER_NAME),
    ("WRONG_VERSION_NUMBER", NoConnection.PLAIN_TEXT),
    ("CERTIFICATE_VERIFY_FAILED", NoConnection.UNTRUSTED),
)

_WORDS: Mapping[NoConnection, str] = MappingProxyType(
    {
        NoConnection.REFUSED: "no daemon listens there",
        NoConnection.HUNG_UP: (
            "it hung up before a word was said, as a daemon with TLS does on a client without"
        ),
        NoConnection.PLAIN_TEXT: "it does not speak TLS",
        NoConnection.UNTRUSTED: "its certificate is not to be trusted here",
        NoConnection.OTHER_NAME: "its certificate is for another name",
        NoConnection.CERTIFICATE_WANTED: "it hung up on a client that shows no certificate",
        NoConnection.CERTIFICATE_REFUSED: "it hung up on the certificate that it was shown",
    }
)


def _cause(details: str, tls: Tls | None) -> NoConnection:
    if not details.startswith(_NEVER_MADE):
        return NoConnection.UNKNOWN
    for text, cause in _TEXTS:
        if text in details:
            return cause
    if "Socket closed" not in details:
        return NoConnection.UNKNOWN
    if tls is None:
        return NoConnection.HUNG_UP
    if tls.certificate is None:
        return NoConnection.CERTIFICATE_WANTED
    return NoConnection.CERTIFICATE_REFUSED
