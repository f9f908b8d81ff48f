"""How amounts, times and answers look, and what a command line means."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest
import typer
from rich.console import Console

from sage_fed.cards.rate_card import RateCard, charge, price_in_single
from sage_fed.cli import options
from sage_fed.cli.ask import Answer, _print_quote, footer
from sage_fed.cli.demo import Outcome, plan, print_next_steps, print_outcomes
from sage_fed.cli.exits import ExitCode, error_object, exit_code, explain
from sage_fed.cli.render import (
    atp_number,
    format_atp,
    format_bytes,
    format_rate,
    format_seconds,
    join_parts,
    parse_atp,
    printable,
)
from sage_fed.cli.streams import between_words
from sage_fed.cli.top import Page
from sage_fed.core import (
    DRAW_VERSION,
    Delta,
    Finished,
    Mode,
    Price,
    Priority,
    Quote,
    Route,
    RouteQuote,
    Started,
    StopReason,
    Tier,
    Timing,
    Usage,
    counted,
    to_plain,
)
from sage_fed.errors import (
    CannotAfford,
    CannotConnect,
    ConfigError,
    InvalidField,
    QueueFull,
    SageFedError,
    TierUnavailable,
)


@pytest.mark.parametrize(
    ("uatp", "expected"),
    [
        (0, "0.00 ATP"),
        (1, "0.000001 ATP"),
        (45_000, "0.045 ATP"),
        (100_000, "0.10 ATP"),
        (12_345_678, "12.35 ATP"),
        (-6_590_000, "-6.59 ATP"),
        (5_000_000_000, "5,000.00 ATP"),
    ],
)
def test_an_amount_shows_the_digits_that_matter(uatp: int, expected: str) -> None:
    """Hundredths for everyday amounts, every digit for tiny ones."""
    assert expected == format_atp(uatp)


@pytest.mark.parametrize(
    ("text", "expected"), [("12.5", 12_500_000), ("0", 0), ("0.0000019", 1), ("1e3", 10**9)]
)
def test_a_limit_is_rounded_down(text: str, expected: int) -> None:
    """An amount finer than a uATP never lets a job cost more than was said."""
    assert expected == parse_atp(text)


@pytest.mark.parametrize("text", ["", "ten", "-1", "nan", "inf", "1e30"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    """Words, negative and infinite amounts, and those beyond the ledger are no limits."""
    with pytest.raises(ValueError, match="amount of ATP"):
        parse_atp(text)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.00085, "850 us"),
        (0.0123, "12.3 ms"),
        (0.25, "250 ms"),
        (1.25, "1.25 s"),
        (90.0, "90.0 s"),
        (200.4, "3 min 20 s"),
        (7384.0, "2 h 3 min"),
    ],
)
def test_a_duration_takes_the_unit_that_fits(seconds: float, expected: str) -> None:
    """Microseconds to hours, a few digits each."""
    assert expected == format_seconds(seconds)


def test_sizes_and_rates() -> None:
    """Bytes in binary units, and no rate where nothing was timed."""
    assert ["512 B", "64.0 MiB", "15.2 GiB"] == [
        format_bytes(size) for size in (512, 64 * 2**20, round(15.2 * 2**30))
    ]
    assert ["50", "", ""] == [format_rate(100, 2.0), format_rate(0, 1.0), format_rate(5, 0.0)]
    assert "1,234.50" == atp_number(1_234_500_000)


def test_a_model_cannot_drive_the_terminal() -> None:
    """Escape sequences lose their escape; text in any language stays."""
    assert "[31mrot\n\tgrößer 緑" == printable("\x1b[31mrot\n\tgrößer 緑\x07\x9b")


def test_values_become_plain_json() -> None:
    """Enums are their words, tuples are lists, dataclasses are objects."""
    route = Route(Tier.STRATEGIC, "EXPLICIT", None)
    expected = {"tier": "strategic", "reason": "EXPLICIT", "requested": None, "downgraded": False}
    expected |= {"mode": "single", "draw_version": DRAW_VERSION}
    assert expected == to_plain(route)
    delta = {"token_ids": [1, 2], "logprobs": [], "text": "ab", "output_tokens": 2, "origins": []}
    assert delta == to_plain(Delta("ab", (1, 2), (), 2))
    assert ["high", "end_of_text"] == to_plain((Priority.HIGH, StopReason.END_OF_TEXT))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            CannotAfford("12 ATP are needed", account="a", detail="BALANCE", retry_after_s=2.04),
            ExitCode.REFUSED,
            ("refused: 12 ATP", "retry after 2.0 s", "sage-fed budget"),
        ),
        (QueueFull("no place", 1.0), ExitCode.UNAVAILABLE, ("refused: no place", "1.0 s")),
        (TierUnavailable("loading", None), ExitCode.UNAVAILABLE, ("sage-fed status",)),
        (InvalidField("job.text", "is empty"), ExitCode.USAGE, ("job.text: is empty",)),
        (ConfigError("listen: bad"), ExitCode.USAGE, ("listen: bad",)),
        (CannotConnect("h:1"), ExitCode.UNAVAILABLE, ("h:1", "sage-fed serve --profile demo")),
        (SageFedError("whatever"), ExitCode.ERROR, ("error: whatever",)),
    ],
)
def test_an_error_is_one_line_with_a_way_on(
    error: SageFedError, code: ExitCode, words: tuple[str, ...]
) -> None:
    """Each class has its exit code, and its line says what to do next."""
    line = explain(error)
    assert code == exit_code(error)
    assert [] == [word for word in words if word not in line]
    assert "\n" not in line


def test_advice_is_given_once_and_in_options() -> None:
    """A sentence that says how long to wait is not repeated, and names what a person can type."""
    error = CannotAfford(
        "above its max_cost_uatp of 1 ATP; wait 2.0 s for the refill",
        account="a", detail="CANNOT_AFFORD", retry_after_s=2.0,
    )  # fmt: skip
    expected = (
        "refused: above its --max-cost of 1 ATP; wait 2.0 s for the refill; "
        "see `sage-fed quote` and `sage-fed budget`"
    )
    assert expected == explain(error)
    assert explain(QueueFull.of_tier("tactical", 9, 1.0)).endswith("; retry after 1.0 s")


def test_a_sentence_that_says_where_to_look_is_left_alone() -> None:
    """The class's own advice would be a second one."""
    error = ConfigError("nobody of that name; see `sage-fed token list`")
    assert "error: nobody of that name; see `sage-fed token list`" == explain(error)


def test_one_is_not_several() -> None:
    """A count takes the form of the word that its number needs."""
    assert ["1 job", "0 jobs", "1,024 jobs"] == [counted(n, "job") for n in (1, 0, 1024)]
    assert ["1 entry", "2 entries"] == [counted(n, "entry", "entries") for n in (1, 2)]
    assert QueueFull.of_tier("tactical", 1).message.startswith("1 job waits for")


def test_an_error_for_a_program_has_its_fields() -> None:
    """`--json` gives the stable reason, and the delay as a number."""
    error = CannotAfford("no", account="a", detail="MAX_COST", retry_after_s=1.5)
    expected = {
        "error": {
            "reason": "CANNOT_AFFORD", "message": "no", "retry_after_s": 1.5, "detail": "MAX_COST",
        }
    }  # fmt: skip
    assert expected == json.loads(json.dumps(error_object(error)))


def test_assignments_are_pairs() -> None:
    """`--set` splits at the first equals sign, and refuses what has none."""
    assert {"a.b": "c=d"} == options.assigned(["a.b=c=d"])
    with pytest.raises(typer.BadParameter, match="KEY=VALUE"):
        options.assigned(["a.b"])


def test_samples_of_a_metrics_page() -> None:
    """Names, labels with escapes and values are read; comments are not."""
    text = (
        "# HELP x_total things\n# TYPE x_total counter\n"
        'x_total{tier="tactical",why="a \\"b\\""} 3.0\n'
        'x_total{tier="strategic",why="c"} 4\ny 1e-05\n'
    )
    page = Page.read(text, 0.0)
    assert {"x_total": 2, "y": 1} == {name: len(read) for name, read in page.series.items()}
    assert ('a "b"', "c") == page.values("x_total", "why")
    assert (7.0, 4.0, None) == (
        page.total("x_total"),
        page.total("x_total", tier="strategic"),
        page.total("z_total"),
    )


def test_the_demo_asks_in_every_mode() -> None:
    """All three modes, a sampled request, a downgrade and a refusal; the same ones every time."""
    requests = plan()
    assert {Tier.TACTICAL, Tier.STRATEGIC, None} == {item.spec.requested for item in requests}
    assert 1 == sum(item.expects_refusal for item in requests)
    assert 1 == sum(item.spec.sampling.seed is not None for item in requests)
    assert 1 == sum(item.spec.allow_downgrade for item in requests)
    assert requests == plan()


def test_what_is_about_an_answer_breaks_between_its_parts() -> None:
    """Lines fit the terminal and no word is cut; one part that is too long stays whole."""
    parts = ("one", "two three", "four", "a long part")
    assert ["one · two three", "four", "a long part"] == join_parts(parts, 16)
    assert ["one · two three · four · a long part"] == join_parts(parts, 80)
    assert list(parts) == join_parts(parts, 3)
    assert [] == join_parts((), 80)


@pytest.mark.parametrize("width", [80, 118, 120])
def test_the_table_of_the_demo_fits_the_terminal(width: int) -> None:
    """A row a request, none wider than the window, and the reason of each readable."""
    page = io.StringIO()
    longest = "tactical: downgrade_max_cost"
    outcomes = [Outcome(request, refusal=longest) for request in plan()]
    print_outcomes(outcomes, Console(file=page, width=width, force_terminal=True, no_color=True))
    lines = [re.sub("\x1b\\[[0-9;]*m", "", line) for line in page.getvalue().splitlines()]
    assert len(plan()) == sum(longest in line for line in lines)
    assert max(len(line) for line in lines) <= width


@pytest.mark.parametrize("found", [False, True])
def test_the_demo_tells_how_to_find_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, found: bool
) -> None:
    """Three commands; where the shell would not find `sage-fed`, first how to make it."""
    if found:
        (tmp_path / "sage-fed").touch(0o755)
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    page = io.StringIO()
    print_next_steps(Console(file=page, width=200))
    lines = page.getvalue().splitlines()
    assert [True] * 3 == [line.startswith("  sage-fed ") for line in lines[-3:]]
    assert ([] if found else ["  . .venv/bin/activate"]) == lines[:-3]


def test_long_texts_break_between_words() -> None:
    """On a terminal no word is cut, not even one that is too long; a pipe gets one line."""
    text = "at most 24 ATP on an-unreasonably-long-name"
    assert ["at most 24", "ATP on", "an-unreasonably-long-name"] == between_words(text, 12)
    assert [text] == between_words(text, 0)
    assert [""] == between_words("", 12)


def test_the_footer_tells_what_was_drafted_and_what_that_saved() -> None:
    """The design's example, on the shipped card: 27 of 31 tokens drafted by the tactical tier."""
    card = RateCard.load()
    usage = Usage.single(
        Tier.STRATEGIC, 0, 0, 31,
        verified=27, accepted=27, drafted=27, drafter=Tier.TACTICAL,
    )  # fmt: skip
    price = Price(charge(card, usage), 10, "c", price_in_single(card, usage, Tier.STRATEGIC))
    (line,) = footer(answer_of(Mode.SPECULATIVE, usage, price), 200)
    parts = line.split(" · ")

    assert "0 + 31 tokens, 27 of them drafted by tactical" in parts
    assert f"{format_atp(price.charged_uatp)} instead of 204.29" in parts
    assert 204_290_000 == price.single_uatp > 2 * price.charged_uatp

    # Some of what was accepted stood in the prompt, or in the output before it.
    lookup = Usage.single(
        Tier.STRATEGIC, 5, 0, 31,
        verified=27, accepted=27, drafted=9, drafter=Tier.TACTICAL,
    )  # fmt: skip
    (line,) = footer(answer_of(Mode.SPECULATIVE, lookup, price), 200)
    assert "5 + 31 tokens, 27 of them drafted by tactical and earlier text" in line.split(" · ")


def test_the_footer_of_one_tier_tells_its_price_alone() -> None:
    """Also where an earlier daemon did not say what one tier would have charged."""
    usage = Usage.single(Tier.STRATEGIC, 5, 0, 4)
    for mode, price in (
        (Mode.SINGLE, Price(5_000_000, 9_000_000, "c", 5_000_000)),
        (Mode.SPECULATIVE, Price(5_000_000, 9_000_000, "c")),
    ):
        (line,) = footer(answer_of(mode, usage, price), 200)
        assert "5.00 ATP charged" in line.split(" · ")
        assert "drafted" not in line


def answer_of(mode: Mode, usage: Usage, price: Price) -> Answer:
    route = Route(Tier.STRATEGIC, "explicit", Tier.STRATEGIC, mode=mode)
    return Answer(
        started=Started("job", route, 10, usage.prompt_tokens, 1, 64),
        finished=Finished(StopReason.LENGTH, usage, Timing(0, 0, 0, 0, 0), price, 0),
    )


def test_a_quote_shows_every_mode(capsys: pytest.CaptureFixture[str]) -> None:
    """With its worst case, what it is expected to cost and to err, and how long it takes."""
    deep = Tier.STRATEGIC
    _print_quote(
        Quote(
            Route(deep, "auto_return", None, mode=Mode.CASCADE),
            (
                RouteQuote(deep, 400_000_000, True, 2.5, Mode.SPECULATIVE, 90_000_000, 0.04),
                RouteQuote(deep, 500_000_000, False, None, Mode.CASCADE, 60_000_000, 0.05),
            ),
            "card", 12, 64, 450_000_000,
        )
    )  # fmt: skip
    head, speculative, cascade, *rest = capsys.readouterr().out.splitlines()

    assert head.split("  ")[0] == "tier"
    for text in ("speculative", "400.00", "90.00", "4.0%", "yes", "2.5"):
        assert text in speculative
    for text in ("cascade", "500.00", "60.00", "5.0%", "no"):
        assert text in cascade
    assert any("strategic, cascade (auto_return)" in line for line in rest)


def test_the_footer_tells_what_was_cached() -> None:
    """How many of the prompt's tokens were found in the prefix cache, where some were."""
    route = Route(Tier.TACTICAL, "client_choice", requested=Tier.TACTICAL)
    started = Started("job", route, 10, 40, 1, 4)
    for cached, words in ((0, "40 + 4 tokens"), (32, "40 + 4 tokens (32 cached)")):
        finished = Finished(
            StopReason.LENGTH, Usage(40, cached, 4), Timing(0, 0, 0, 0, 0), Price(5, 10, "c"), 0
        )
        (line,) = footer(Answer(started=started, finished=finished), 200)
        assert words in line.split(" · ")
