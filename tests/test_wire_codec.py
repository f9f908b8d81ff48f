"""The codec: every value that travels arrives as it was sent."""

from __future__ import annotations

import enum
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message as ProtoMessage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sage_fed import core
from sage_fed.core import TIER_ROLES, Tier
from sage_fed.errors import CallFailed, InvalidField
from sage_fed.v1 import admin_pb2, budget_pb2, inference_pb2, model_pb2, types_pb2
from sage_fed.wire import bounds, codec

TRAVELLERS: list[tuple[Any, type[ProtoMessage]]] = [
    (core.JobSpec, types_pb2.JobSpec),
    (core.BudgetChange, admin_pb2.SetBudgetRequest),
    (core.Event, inference_pb2.GenerateStreamResponse),
    (core.Answer, inference_pb2.GenerateResponse),
    (core.Quote, inference_pb2.QuoteResponse),
    (core.TokenCount, inference_pb2.CountTokensResponse),
    (core.Budget, types_pb2.Budget),
    (core.EntryPage, budget_pb2.ListEntriesResponse),
    (core.ModelStatus, model_pb2.Model),
    (core.DaemonStatus, model_pb2.GetStatusResponse),
    (core.ModeReturns, model_pb2.CompareModesResponse),
    (core.LoadReport, admin_pb2.GetLoadResponse),
    (core.CalibrationEvent, admin_pb2.CalibrateResponse),
    (core.CardStatus, admin_pb2.AdoptRateCardResponse),
]
"""What travels, and as which message."""

AT_HOME = {
    (core.JobSpec, "account"): "",
    (core.JobSpec, "call_deadline_s"): None,
    (core.JobSpec, "trace"): None,
    (core.JobSpec, "one_reply"): False,
    (core.Refusal, "denied_uatp"): 0,
    (core.Refusal, "allowed_jobs"): 0,
}
"""Fields that do not travel, and what stands for them."""

BITS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}


def values(kind: Any, of: FieldDescriptor | None, inside: Descriptor) -> st.SearchStrategy[Any]:  # noqa: ANN401 - any type
    """Values of one field's type that its message can carry."""
    if kind is core.Prompt:
        return prompts()
    if isinstance(kind, UnionType):
        members = {
            f.message_type.name: f for one in inside.oneofs for f in one.fields if f.message_type
        }
        return st.one_of(
            st.none() if each is NoneType
            else instances(each, members[each.__name__].message_type) if each.__name__ in members
            else values(each, of, inside)
            for each in get_args(kind)
        )  # fmt: skip
    if kind is Tier:
        return st.sampled_from(TIER_ROLES)
    assert of is not None
    if get_origin(kind) is tuple and of.is_repeated and get_args(kind)[-1] is Ellipsis:
        return st.lists(values_of_item(get_args(kind)[0], of), max_size=3).map(tuple)
    return values_of_item(kind, of)


def values_of_item(kind: Any, of: FieldDescriptor) -> st.SearchStrategy[Any]:  # noqa: ANN401 - any type
    if get_origin(kind) is tuple:
        assert of.message_type is not None
        parts = zip(get_args(kind), of.message_type.fields, strict=True)
        return st.tuples(*(values_of_item(part, field) for part, field in parts))
    if isinstance(kind, enum.EnumMeta):
        return st.sampled_from(list(kind))
    if kind is bool:
        return st.booleans()
    if kind is float:
        # What is absent and zero is one for a field without presence.
        return st.floats(allow_nan=False, allow_infinity=True).filter(bool)
    if kind is str:
        return st.text(max_size=8)
    if kind is int and of.message_type is not None:
        return st.integers(0, 2**60)
    if kind is int and of.type == FieldDescriptor.TYPE_STRING:
        return st.integers(0, 2_900_000)
    if kind is int:
        return st.integers(*BITS[of.cpp_type])
    assert of.message_type is not None
    return instances(kind, of.message_type)


def instances(kind: type, descriptor: Descriptor) -> st.SearchStrategy[Any]:
    """Values of a class, with every field that its message has."""
    hints = get_type_hints(kind)
    parts: dict[str, st.SearchStrategy[Any]] = {}
    for name in (field.name for field in fields(kind)):
        if (kind, name) in AT_HOME:
            parts[name] = st.just(AT_HOME[kind, name])
            continue
        there = codec._NAMES.get((kind, name), name)
        parts[name] = values(hints[name], descriptor.fields_by_name.get(there), descriptor)
    return st.builds(kind, **parts)


def prompts() -> st.SearchStrategy[core.Prompt]:
    turns = st.builds(core.Message, st.text(max_size=5), st.text(max_size=9))
    ids = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4).map(tuple)
    return st.builds(core.Prompt, messages=st.lists(turns, max_size=3).map(tuple)) | st.builds(
        core.Prompt, token_ids=ids
    )


def travelling() -> st.SearchStrategy[tuple[Any, type[ProtoMessage], Any]]:
    """(class, message, value) of everything that travels."""

    def one(kind: Any, message: type[ProtoMessage]) -> st.SearchStrategy[Any]:  # noqa: ANN401 - or a union
        made = (
            values(kind, None, message.DESCRIPTOR)
            if isinstance(kind, UnionType)
            else instances(kind, message.DESCRIPTOR)
        )
        return st.tuples(st.just(kind), st.just(message), made)

    return st.one_of(one(kind, message) for kind, message in TRAVELLERS)


@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(travelling())
def test_what_is_sent_arrives(sent: tuple[Any, type[ProtoMessage], Any]) -> None:
    """decode(encode(x)) == x, over the bytes, for every value of every kind."""
    kind, message, value = sent
    raw = codec.encode(value, message).SerializeToString()
    account = {"account": ""} if kind is core.JobSpec else {}
    assert value == codec.decode(kind, message.FromString(raw), **account)


def test_what_does_not_travel_is_named() -> None:
    """A field that a message lacks is at home here; any other would be lost in silence."""
    seen: set[type] = set()

    def look(kind: Any, descriptor: Descriptor) -> None:  # noqa: ANN401 - any type
        if isinstance(kind, UnionType):
            for each in get_args(kind):
                look(each, codec._members(descriptor)[each.__name__].message_type)
            return
        if kind in seen:
            return
        seen.add(kind)
        there = codec._travelling(kind, descriptor)
        lost = {field.name for field in fields(kind)} - there.keys()
        assert lost == {name for owner, name in AT_HOME if owner is kind}, kind

    for kind, message in TRAVELLERS:
        look(kind, message.DESCRIPTOR)
    assert {core.Started, core.JobSpec, core.CalibrationResult} <= seen


def test_a_tier_that_the_proto_does_not_name_travels_by_its_name() -> None:
    """A third tier has no value in the enum; it arrives by its name, and a role as the role."""
    deep = Tier(2, "deep")
    sent = codec.encode(core.Route(deep, "requested", requested=deep), types_pb2.Route)
    assert (types_pb2.TIER_UNSPECIFIED, "deep", "deep") == (
        sent.tier,
        sent.tier_name,
        sent.requested_name,
    )
    arrived = codec.decode(core.Route, sent)
    assert ("deep", "deep") == (arrived.tier.name, str(arrived.requested))
    by_name = types_pb2.JobSpec(text="hi", tier_name="strategic")
    assert Tier.STRATEGIC is codec.decode(core.JobSpec, by_name, account="").requested


@pytest.mark.parametrize(
    ("kind", "message", "said"),
    [
        (core.Event, inference_pb2.GenerateStreamResponse(), "sent an event that"),
        (core.Finished, inference_pb2.Finished(stop_reason=99), "said StopReason 99, which"),  # type: ignore[arg-type]
        (core.RunningJob, admin_pb2.RunningJob(), "said Tier 0, which"),
        (core.Route, types_pb2.Route(tier=9), "said Tier 9, which"),  # type: ignore[arg-type]
    ],
)
def test_a_newer_daemons_word_is_an_error(kind: Any, message: ProtoMessage, said: str) -> None:  # noqa: ANN401 - or a union
    """A client never guesses what a word means that it does not know."""
    with pytest.raises(CallFailed, match=f"the daemon {said} this client does not know"):
        codec.decode(kind, message)


def test_what_protobuf_cannot_carry_is_named_by_its_path() -> None:
    """The daemon's name of the field, also inside a list of messages."""
    turns = (core.Message("user", "hi"), core.Message("user", "\ud800"))
    spec = core.JobSpec("", core.Prompt(turns))
    with pytest.raises(InvalidField) as raised:
        codec.encode(spec, types_pb2.JobSpec, "job")
    assert "job.chat.messages[1].content" == raised.value.field


def test_the_page_of_bounds_is_the_table() -> None:
    """docs/requests.md lists what the daemon checks; a new bound has to be written there."""
    rows = [f"| `{field}` | {text} |" for field, text in bounds.table()]
    page = (Path(__file__).parent.parent / "docs" / "requests.md").read_text()
    assert rows == [line for line in page.splitlines() if line.startswith("| `")]


def test_every_bound_is_of_a_field() -> None:
    """A renamed field would lose its bound in silence."""
    files = (types_pb2, inference_pb2, budget_pb2, model_pb2, admin_pb2)
    messages = {
        name: message
        for file in files
        for name, message in file.DESCRIPTOR.message_types_by_name.items()
    }
    for path in (*bounds.BOUNDS, *bounds.REQUIRED):
        message, _, name = path.partition(".")
        known = [*messages[message].fields_by_name, *messages[message].oneofs_by_name]
        assert name in known, path
