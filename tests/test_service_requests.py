"""Parsing of requests: every limit by name, and nothing else ever raised."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

import sage_fed
from sage_fed.client import job_of
from sage_fed.core import (
    TIER_ROLES,
    Caller,
    JobSpec,
    Message,
    Priority,
    Prompt,
    Role,
    SamplingRequest,
    Tier,
)
from sage_fed.errors import InvalidField
from sage_fed.service.edge import Call
from sage_fed.service.services import parse_job
from sage_fed.settings import LimitSettings
from sage_fed.v1 import inference_pb2, types_pb2
from sage_fed.wire import bounds

LIMITS = LimitSettings(
    max_prompt_chars=20,
    max_messages=3,
    max_stop_strings=2,
    max_stop_chars=4,
    max_stop_token_ids=2,
    max_top_logprobs=5,
    max_new_tokens=64,
    default_new_tokens=8,
    max_request_id_chars=8,
    max_deadline_s=60.0,
)


def parse(
    job: types_pb2.JobSpec,
    limits: LimitSettings = LIMITS,
    *,
    call_remaining_s: float | None = None,
    one_reply: bool = False,
) -> JobSpec:
    """The job as the service reads it from a call of `robot`'s."""
    caller = Caller("robot", Role.USER)
    call = Call(caller, 0.0, call_remaining_s, open_call=None)  # type: ignore[arg-type] # not asked
    kind = inference_pb2.GenerateRequest if one_reply else inference_pb2.GenerateStreamRequest
    request = kind(job=job)
    bounds.check(request, limits)
    return parse_job(request, limits, call)


def chat(*turns: tuple[str, str]) -> types_pb2.ChatMessages:
    return types_pb2.ChatMessages(
        messages=[types_pb2.ChatMessage(role=role, content=content) for role, content in turns]
    )


def sampled(**fields: Any) -> types_pb2.JobSpec:  # noqa: ANN401 - one of many types each
    return types_pb2.JobSpec(text="hi", sampling=types_pb2.SamplingParams(**fields))


def test_an_empty_request_takes_every_default() -> None:
    """Only the prompt is needed; what is absent stays absent, which is not zero."""
    expected = JobSpec(account="robot", prompt=Prompt(messages=(Message("user", "hi"),)))
    assert expected == parse(types_pb2.JobSpec(text="hi"))


def test_zeros_that_were_sent_are_zeros() -> None:
    """A present zero is told from an absent field."""
    spec = parse(sampled(temperature=0.0, top_k=0, min_p=0.0, seed=0, top_logprobs=0))
    expected = SamplingRequest(temperature=0.0, top_k=0, min_p=0.0, seed=0, top_logprobs=0)
    assert expected == spec.sampling


REFUSED: list[tuple[str, types_pb2.JobSpec]] = [
    ("job.prompt", types_pb2.JobSpec()),
    ("job.text", types_pb2.JobSpec(text="")),
    ("job.text", types_pb2.JobSpec(text="x" * 21)),
    ("job.chat.messages", types_pb2.JobSpec(chat=chat())),
    ("job.chat.messages", types_pb2.JobSpec(chat=chat(*[("user", "x")] * 4))),
    ("job.chat.messages[0].role", types_pb2.JobSpec(chat=chat(("", "x")))),
    ("job.chat.messages[1].role", types_pb2.JobSpec(chat=chat(("user", "x"), ("tool", "x")))),
    (
        "job.chat.messages[1].content",
        types_pb2.JobSpec(chat=chat(("user", "x" * 20), ("user", "x"))),
    ),
    ("job.token_ids.ids", types_pb2.JobSpec(token_ids=types_pb2.TokenIds())),
    ("job.token_ids.ids", types_pb2.JobSpec(token_ids=types_pb2.TokenIds(ids=[1] * 21))),
    ("job.tier", types_pb2.JobSpec(text="hi", tier=9)),  # type: ignore[arg-type] # on purpose
    ("job.tier_name", types_pb2.JobSpec(text="hi", tier_name="deep")),
    ("job.tier_name", types_pb2.JobSpec(text="hi", tier=1, tier_name="strategic")),  # type: ignore[arg-type]
    ("job.priority", types_pb2.JobSpec(text="hi", priority=-1)),  # type: ignore[arg-type]
    ("job.max_cost_uatp", types_pb2.JobSpec(text="hi", max_cost_uatp=-1)),
    ("job.complexity", types_pb2.JobSpec(text="hi", complexity=1.01)),
    ("job.complexity", types_pb2.JobSpec(text="hi", complexity=math.nan)),
    ("job.task_class", types_pb2.JobSpec(text="hi", task_class="x" * 65)),
    ("job.task_class", types_pb2.JobSpec(text="hi", task_class="a\n")),
    ("job.client_request_id", types_pb2.JobSpec(text="hi", client_request_id="x" * 9)),
    ("job.client_request_id", types_pb2.JobSpec(text="hi", client_request_id="a\nb")),
    *[
        (f"job.sampling.{name}", sampled(**{name: value}))
        for name, values in {
            "temperature": (-0.1, 2.1, math.nan, math.inf, -math.inf),
            "top_p": (0.0, -0.1, 1.1, math.nan, math.inf),
            "min_p": (-0.1, 1.1, math.nan, math.inf),
            "repetition_penalty": (0.0, 2.1, math.nan, math.inf),
            "presence_penalty": (-2.1, 2.1, math.nan, -math.inf),
            "frequency_penalty": (-2.1, 2.1, math.nan, math.inf),
            "max_new_tokens": (0, 65, 2**32 - 1),
            "top_logprobs": (6, 2**32 - 1),
            "deadline_s": (0.0, -1.0, 60.1, math.nan, math.inf),
            "stop": (["a", "b", "c"],),
            "stop_token_ids": ([1, 1, 1],),
        }.items()
        for value in values
    ],
    ("job.sampling.stop[0]", sampled(stop=[""])),
    ("job.sampling.stop[1]", sampled(stop=["a", "abcde"])),
]


@pytest.mark.parametrize(("field", "job"), REFUSED)
def test_what_is_out_of_range_is_refused_by_name(field: str, job: types_pb2.JobSpec) -> None:
    """The error names the field as a path in the proto."""
    with pytest.raises(InvalidField) as raised:
        parse(job)
    assert field == raised.value.field


@pytest.mark.parametrize(
    ("job", "text"),
    [
        (sampled(max_new_tokens=2**32 - 1), "must be from 1 to 64, not 4294967295"),
        (sampled(top_logprobs=2**32 - 1), "must be from 0 to 5, not 4294967295"),
        (sampled(temperature=2.0000001), "must be from 0 to 2, not 2.0000001"),
        (sampled(temperature=-0.5), "must be from 0 to 2, not -0.5"),
        (sampled(temperature=3.0), "must be from 0 to 2, not 3"),
        (sampled(temperature=math.nan), "must be from 0 to 2, not nan"),
        (sampled(top_p=1.0000001), "must be above 0 and at most 1, not 1.0000001"),
        (sampled(deadline_s=1e300), "must be above 0 and at most 60, not 1e+300"),
        (sampled(deadline_s=math.inf), "must be above 0 and at most 60, not inf"),
        (sampled(deadline_s=12345678.5), "must be above 0 and at most 60, not 12345678.5"),
        (
            types_pb2.JobSpec(text="hi", complexity=1.0000001),
            "must be from 0 to 1, not 1.0000001",
        ),
    ],
)
def test_a_refused_number_is_written_as_it_was_sent(job: types_pb2.JobSpec, text: str) -> None:
    """Rounded, a number just beyond a bound would read as the bound itself."""
    with pytest.raises(InvalidField) as raised:
        parse(job)
    assert text == raised.value.description


def test_a_bound_is_written_in_full() -> None:
    """A large limit of the operator's is named to the last digit."""
    limits = LimitSettings(max_deadline_s=1234567.5)
    with pytest.raises(InvalidField, match=r"at most 1234567\.5, not 2000000$"):
        parse(sampled(deadline_s=2e6), limits)


ACCEPTED: list[types_pb2.JobSpec] = [
    types_pb2.JobSpec(text="x" * 20),
    types_pb2.JobSpec(chat=chat(*[("user", "x")] * 3)),
    types_pb2.JobSpec(token_ids=types_pb2.TokenIds(ids=[2**32 - 1] * 20)),
    types_pb2.JobSpec(text="hi", client_request_id="x" * 8, max_cost_uatp=0, complexity=1.0),
    sampled(temperature=2.0, top_p=1.0, top_k=2**32 - 1, min_p=1.0, repetition_penalty=2.0),
    sampled(presence_penalty=-2.0, frequency_penalty=2.0),
    sampled(max_new_tokens=64, top_logprobs=5, deadline_s=60.0, stop=["abcd", "a"]),
    sampled(max_new_tokens=1, seed=2**64 - 1),
]


@pytest.mark.parametrize("job", ACCEPTED)
def test_the_bounds_themselves_are_accepted(job: types_pb2.JobSpec) -> None:
    """A limit says the most that is allowed, not the least that is refused."""
    assert "robot" == parse(job).account


@pytest.mark.parametrize(
    ("value", "tier"),
    [
        (types_pb2.TIER_UNSPECIFIED, None),
        (types_pb2.TIER_AUTO, None),
        (types_pb2.TIER_TACTICAL, Tier.TACTICAL),
        (types_pb2.TIER_STRATEGIC, Tier.STRATEGIC),
    ],
)
def test_every_tier_of_the_proto_has_its_meaning(value: types_pb2.Tier, tier: Tier | None) -> None:
    """Unspecified is AUTO; both are core's None."""
    assert tier is parse(types_pb2.JobSpec(text="hi", tier=value)).requested


@pytest.mark.parametrize("name", ["tactical", "deep"])
def test_a_job_may_name_any_of_the_daemons_tiers(name: str) -> None:
    """What the job then asks for is that tier, also one that the proto has no value for."""
    tiers = (*TIER_ROLES, Tier(2, "deep"))
    call = Call(Caller("robot", Role.USER), 0.0, None, open_call=None)  # type: ignore[arg-type]
    request = inference_pb2.GenerateRequest(job=types_pb2.JobSpec(text="hi", tier_name=name))
    bounds.check(request, LIMITS, tiers=tiers)
    (asked,) = (tier for tier in tiers if tier.name == name)
    assert asked is parse_job(request, LIMITS, call, tiers).requested
    with pytest.raises(InvalidField, match="must be one of strategic") as raised:
        bounds.check(request, LIMITS, tiers=(Tier.STRATEGIC,))
    assert "job.tier_name" == raised.value.field


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("prompt", inference_pb2.CountTokensRequest()),
        ("text", inference_pb2.CountTokensRequest(text="x" * 21)),
        ("chat.messages", inference_pb2.CountTokensRequest(chat=chat())),
        ("tier", inference_pb2.CountTokensRequest(text="hi", tier=4)),  # type: ignore[arg-type]
    ],
)
def test_a_count_is_limited_like_a_job(
    field: str, request_: inference_pb2.CountTokensRequest
) -> None:
    """Counting is free, so it must not be a way around the limits."""
    with pytest.raises(InvalidField) as raised:
        bounds.check(request_, LIMITS)
    assert field == raised.value.field


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


NUMBERS = maybe(st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, 1.0, 2.0]))
UINT32 = maybe(st.integers(0, 2**32 - 1) | st.integers(0, 70))
UINT64 = maybe(st.integers(0, 2**64 - 1))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=24)
ENUMS = st.integers(-(2**31), 2**31 - 1) | st.integers(0, 4)

SAMPLINGS = st.builds(
    types_pb2.SamplingParams,
    temperature=NUMBERS,
    top_p=NUMBERS,
    top_k=UINT32,
    min_p=NUMBERS,
    repetition_penalty=NUMBERS,
    presence_penalty=NUMBERS,
    frequency_penalty=NUMBERS,
    seed=UINT64,
    max_new_tokens=UINT32,
    stop=st.lists(TEXTS, max_size=3),
    stop_token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=3),
    ignore_eos=maybe(st.booleans()),
    top_logprobs=UINT32,
    deadline_s=NUMBERS,
)
CHATS = st.builds(
    types_pb2.ChatMessages,
    messages=st.lists(
        st.builds(
            types_pb2.ChatMessage,
            role=st.sampled_from(["system", "user", "assistant", "tool", ""]),
            content=TEXTS,
        ),
        max_size=4,
    ),
)
PROMPTS = st.one_of(
    st.just({}),
    TEXTS.map(lambda text: {"text": text}),
    CHATS.map(lambda messages: {"chat": messages}),
    st.lists(st.integers(0, 2**32 - 1), max_size=22).map(
        lambda ids: {"token_ids": types_pb2.TokenIds(ids=ids)}
    ),
)
FIELDS = st.fixed_dictionaries(
    {
        "tier": ENUMS,
        "allow_downgrade": st.booleans(),
        "max_cost_uatp": maybe(st.integers(-(2**63), 2**63 - 1)),
        "complexity": NUMBERS,
        "task_class": TEXTS,
        "priority": ENUMS,
        "client_request_id": TEXTS,
        "sampling": maybe(SAMPLINGS),
    }
)
MESSAGES = st.builds(lambda prompt, fields: types_pb2.JobSpec(**prompt, **fields), PROMPTS, FIELDS)


def parse_or_refuse(job: types_pb2.JobSpec, remaining_s: float | None) -> JobSpec | None:
    """The job, or None where a field of it is refused by a name inside `job`."""
    try:
        return parse(job, LIMITS, call_remaining_s=remaining_s)
    except InvalidField as error:
        if error.field.startswith("job."):
            return None
        raise


@given(MESSAGES, maybe(st.floats(allow_nan=True, allow_infinity=True)))
def test_a_message_is_a_job_or_an_invalid_field(
    job: types_pb2.JobSpec, remaining_s: float | None
) -> None:
    """Whatever a client sends: a job within the limits, or InvalidField, and nothing else."""
    spec = parse_or_refuse(job, remaining_s)
    if spec is None:
        return
    assert 1 <= len(spec.prompt.messages) + len(spec.prompt.token_ids) <= 20
    for value in (spec.deadline_s, spec.complexity, spec.sampling.temperature, spec.sampling.top_p):
        assert value is None or (math.isfinite(value) and 0.0 <= value <= 60.0)


@given(st.binary(max_size=200))
def test_any_bytes_that_parse_are_a_job_or_an_invalid_field(raw: bytes) -> None:
    """The same for messages that no builder of ours would make."""
    try:
        job = types_pb2.JobSpec.FromString(raw)
    except DecodeError:  # not a message: the edge has refused it before
        return
    spec = parse_or_refuse(job, None)
    assert spec is None or "robot" == spec.account


def ranged(low: float, high: float, *, above: bool = False) -> st.SearchStrategy[float | None]:
    return maybe(st.floats(low, high, exclude_min=above))


SPECS = st.builds(
    JobSpec,
    account=st.just("robot"),
    prompt=st.one_of(
        st.lists(
            st.builds(
                Message,
                role=st.sampled_from(["system", "user", "assistant"]),
                content=st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
            ),
            min_size=1,
            max_size=3,
        ).map(lambda messages: Prompt(messages=tuple(messages))),
        st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20).map(
            lambda ids: Prompt(token_ids=tuple(ids))
        ),
    ),
    requested=maybe(st.sampled_from(TIER_ROLES)),
    allow_downgrade=st.booleans(),
    max_cost_uatp=maybe(st.integers(0, 2**63 - 1)),
    complexity=ranged(0.0, 1.0),
    task_class=st.text("abc-", max_size=8),
    priority=st.sampled_from(Priority),
    client_request_id=st.text("abc-", max_size=8),
    sampling=st.builds(
        SamplingRequest,
        temperature=ranged(0.0, 2.0),
        top_p=ranged(0.0, 1.0, above=True),
        top_k=UINT32,
        min_p=ranged(0.0, 1.0),
        repetition_penalty=ranged(0.0, 2.0, above=True),
        presence_penalty=ranged(-2.0, 2.0),
        frequency_penalty=ranged(-2.0, 2.0),
        seed=UINT64,
        max_new_tokens=maybe(st.integers(1, 64)),
        stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=2).map(tuple),
        ignore_eos=st.booleans(),
        top_logprobs=maybe(st.integers(0, 5)),
        deadline_s=ranged(0.0, 60.0, above=True),
    ),
)


@given(SPECS)
def test_what_our_client_sends_is_what_the_daemon_reads(spec: JobSpec) -> None:
    """Client and service agree on every field: core -> wire -> core changes nothing."""
    raw = job_of(spec).SerializeToString()
    assert spec == parse(types_pb2.JobSpec.FromString(raw))


@pytest.mark.parametrize(
    "make",
    [
        lambda: job_of("half a \ud83d pair"),
        lambda: job_of("hi", max_new_tokens=2**32),
        lambda: job_of("hi", seed=-1),
        lambda: job_of(Prompt(token_ids=(-1,))),
    ],
)
def test_what_the_wire_cannot_carry_is_an_invalid_field(make: Callable[[], object]) -> None:
    """The client raises our error, not one of protobuf's."""
    with pytest.raises(InvalidField):
        make()


@pytest.mark.parametrize(
    ("unknown", "advice"),
    [
        ("max_tokens", "max_new_tokens"),
        ("max_completion_tokens", "max_new_tokens"),
        ("request_id", "client_request_id"),
        ("deadline", "deadline_s"),
        ("stop_sequences", "tier, allow_downgrade, max_cost_uatp"),
    ],
)
def test_an_unknown_keyword_is_an_error_of_the_caller(unknown: str, advice: str) -> None:
    """It names the keyword and the closest one that exists, or else them all."""
    with pytest.raises(TypeError, match=f"'{unknown}'.*{advice}"):
        job_of("hi", **{unknown: 3})


def test_keywords_beside_a_whole_job_are_an_error_of_the_caller() -> None:
    """Which of the two counts could only be guessed."""
    spec = JobSpec(account="", prompt=Prompt(messages=(Message("user", "hi"),)))
    with pytest.raises(TypeError, match="max_new_tokens"):
        job_of(spec, max_new_tokens=3)


@pytest.mark.parametrize(
    "prompt", [None, 3, b"hi", [{"role": "user", "content": "hi"}], ["hi"], Message("user", "hi")]
)
def test_what_is_no_prompt_is_an_error_of_the_caller(prompt: object) -> None:
    """It says what a prompt is."""
    with pytest.raises(TypeError, match="JobSpec, a Prompt, a sequence of Message or a str"):
        job_of(prompt)  # type: ignore[arg-type] # on purpose


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"tier": "tactical"}, {"tier": Tier.TACTICAL}),
        ({"tier": "strategic"}, {"tier": Tier.STRATEGIC}),
        ({"tier": "auto"}, {}),
        ({"tier": None}, {}),
        ({"priority": "high"}, {"priority": Priority.HIGH}),
        ({"priority": "low"}, {"priority": Priority.LOW}),
        ({"priority": 3}, {"priority": Priority.HIGH}),
        ({"stop": "\n\n"}, {"stop": ["\n\n"]}),
        ({"stop": None}, {}),
    ],
)
def test_a_word_stands_for_its_value(given: dict[str, Any], meant: dict[str, Any]) -> None:
    """Names of tiers and priorities are taken as the enums are, and one stop string is one."""
    assert job_of("hi", **meant) == job_of("hi", **given)


def test_words_in_a_whole_job_stand_for_their_values() -> None:
    """A JobSpec's fields are read as the keywords are."""
    prompt = Prompt(messages=(Message("user", "hi"),))
    spec = JobSpec("", prompt, requested="tactical", priority="high")  # type: ignore[arg-type]
    assert job_of("hi", tier=Tier.TACTICAL, priority=Priority.HIGH) == job_of(spec)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            {"tier": "tacticla"},
            "job.tier: must be one of auto, tactical, strategic, not 'tacticla'",
        ),
        ({"tier": 1}, "job.tier: must be one of auto, tactical, strategic, not 1"),
        ({"tier": ["tactical"]}, "job.tier"),
        ({"priority": "urgent"}, "job.priority: must be one of low, normal, high, not 'urgent'"),
        ({"priority": 9}, "job.priority: must be one of low, normal, high, not 9"),
        ({"max_new_tokens": "3"}, "job.sampling.max_new_tokens: must be a whole number"),
        ({"max_new_tokens": 3.5}, "job.sampling.max_new_tokens: must be a whole number"),
        ({"allow_downgrade": "no"}, "job.allow_downgrade"),
        ({"stop": 3}, "job.sampling.stop"),
    ],
)
def test_a_wrong_value_is_refused_by_name(given: dict[str, Any], complaint: str) -> None:
    """The client says which field, and what it takes."""
    with pytest.raises(InvalidField, match=complaint):
        job_of("hi", **given)


def test_a_users_type_checker_knows_the_keywords(tmp_path: Path) -> None:
    """The package is typed: `mypy --strict` passes what exists and finds what does not."""
    script = tmp_path / "robot.py"
    script.write_text(
        "from sage_fed.client import Answer, Client\n"
        "def ask(client: Client) -> Answer:\n"
        "    client.quote('hi', tier='strategic', priority='high', stop='.')\n"
        "    client.count_tokens('hi', 'tactical')\n"
        "    client.generate('hi', max_tokens=3)\n"
        "    client.stream('hi', tier='tacticla')\n"
        "    return client.generate('hi', max_new_tokens=3, seed=None)\n"
    )
    checked = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--config-file", ""),
            *("--follow-imports", "silent", str(script)),
        ],
        # An editable installation is found by an import hook, which a type checker does not run.
        env=os.environ | {"MYPYPATH": str(Path(sage_fed.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    found = re.findall(r"robot.py:(\d+): error: (.*)", checked.stdout)
    assert [("5", "max_tokens"), ("6", "tacticla")] == [
        (line, word) for line, text in found for word in ("max_tokens", "tacticla") if word in text
    ], checked.stdout
    assert 2 == len(found), checked.stdout


def test_a_cost_is_suggested_with_its_unit() -> None:
    """Who means 5 ATP and writes 5 uATP would be refused everything."""
    with pytest.raises(
        TypeError, match=r"'max_cost_uatp'\? It is in micro-ATP: 5 ATP is 5_000_000"
    ):
        job_of("hi", max_cost=5)  # type: ignore[typeddict-item]


@pytest.mark.parametrize("ids", [17, "17"])
def test_ids_that_are_no_sequence_are_named(ids: object) -> None:
    """The error of Python alone says that an int cannot be iterated, and not which."""
    with pytest.raises(TypeError, match=r"^stop_token_ids is a sequence of token ids, .* not "):
        job_of("hi", stop_token_ids=ids)  # type: ignore[typeddict-item]
