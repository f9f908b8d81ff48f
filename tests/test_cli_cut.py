"""Answers that did not come to their end, and how a script and a person learn of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from sage_fed.cli import ask
from sage_fed.cli.app import build_app
from sage_fed.cli.exits import ConnectionBroke, ExitCode, exit_code, explain
from sage_fed.cli.options import Connection
from sage_fed.core import (
    Delta,
    Event,
    Finished,
    JobSpec,
    Price,
    Route,
    Started,
    StopReason,
    Tier,
    Timing,
    Usage,
)
from sage_fed.errors import CannotConnect

STARTED = Started("job-1", Route(Tier.TACTICAL, "explicit", None), 9, 3, 7, 16)
CUTS = {
    StopReason.ABORTED: "aborted by an operator or by the daemon's stop",
    StopReason.CANCELLED: "the job was cancelled",
    StopReason.DEADLINE: "the deadline passed",
}


class CutShort:
    """A client whose every answer stops for the given reason."""

    def __init__(self, reason: StopReason, *, replayed: bool = False) -> None:
        self.reason = reason
        self.started = replace(STARTED, replayed=replayed)

    def stream(self, _spec: JobSpec) -> Iterator[Event]:
        """One piece of text, then the end."""
        yield self.started
        yield Delta("The ans", (1, 2), (), 2)
        yield Finished(self.reason, Usage(3, 0, 2), Timing(0, 0, 0, 0, 0), Price(5, 9, "c"), 100)


def connected_to(client: object) -> Callable[..., object]:
    return lambda _connection, work: work(client)


@pytest.mark.parametrize("reason", StopReason)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_cut_answer_is_no_success(
    monkeypatch: pytest.MonkeyPatch, reason: StopReason, *, as_json: bool
) -> None:
    """Aborted, cancelled, out of time: exit code 1 and one line; other ends are silent."""
    monkeypatch.setattr(Connection, "call", connected_to(CutShort(reason)))
    result = CliRunner().invoke(build_app(), ["ask", "x", *(["--json"] * as_json)])
    cut = CUTS.get(reason)
    expected = (1, f"the answer was cut: {cut}\n") if cut else (0, "")
    assert expected == (result.exit_code, result.stderr)
    text = json.loads(result.stdout)["text"] if as_json else result.stdout.rstrip("\n")
    assert "The ans" == text


def test_a_replay_says_that_the_answer_was_cut_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask once more changes nothing, so it says what does."""
    monkeypatch.setattr(
        Connection, "call", connected_to(CutShort(StopReason.DEADLINE, replayed=True))
    )
    result = CliRunner().invoke(build_app(), ["ask", "x", "--request-id", "one"])
    assert 1 == result.exit_code
    assert (
        "the answer was cut: the deadline passed, when this request id was first asked; "
        "choose another --request-id to have it whole\n" == result.stderr
    )


def test_a_cut_turn_ends_a_piped_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script's conversation does not go on from half an answer."""
    monkeypatch.setattr(Connection, "call", connected_to(CutShort(StopReason.ABORTED)))
    result = CliRunner().invoke(build_app(), ["chat"], input="one\ntwo\n")
    assert (1, "The ans\n") == (result.exit_code, result.stdout)
    assert result.stderr.startswith("the answer was cut: ")


def lost(*events: Event) -> Iterator[Event]:
    yield from events
    raise CannotConnect("h:1")


def test_a_daemon_lost_in_mid_answer() -> None:
    """The text's line is closed, and the message is about the answer, not the address."""
    shown: list[str] = []
    with pytest.raises(ConnectionBroke) as broke:
        ask.follow(lost(STARTED, Delta("The ans", (1,), (), 1)), shown.append)
    assert ["The ans", "\n"] == shown
    expected = (
        "error: the connection to h:1 broke in mid-answer; "
        "an unfinished job is not charged once the daemon restarts"
    )
    assert (ExitCode.UNAVAILABLE, expected) == (exit_code(broke.value), explain(broke.value))


def test_a_daemon_that_was_never_there() -> None:
    """Before the stream has begun it is still the ordinary error."""
    with pytest.raises(CannotConnect) as error:
        ask.follow(lost(), lambda _: None)
    assert "is the daemon running?" in explain(error.value)
