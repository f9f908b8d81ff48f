"""Far more jobs than there are places: who is refused is told so, costs nothing and is counted.

The figures of it (`bench/overload.py`) are measured; here is what holds at any speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from daemon_process import DaemonProcess
from sound_daemon import sound_daemon

from sage_fed.cli import top
from sage_fed.client import Client
from sage_fed.core import TIER_ROLES, StopReason, Tier
from sage_fed.errors import QueueFull, RateLimited, Retryable

SETTINGS = (
    *("--set", "budget.initial_atp=100000000", "--set", "budget.capacity_atp=100000000"),
    *("--set", "budget.refill_atp_per_s=0"),
    *("--set", "tactical.max_batch=2", "--set", "tactical.max_waiting=2"),
    *("--set", "strategic.max_batch=2", "--set", "strategic.max_waiting=2"),
)
NUM_CLIENTS = 24
JOBS_EACH = 20
NUM_TOKENS = 48


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with sound_daemon(tmp_path / "state", *SETTINGS) as daemon:
        yield daemon


class Flood:
    """Clients that ask again at once, whatever they are told."""

    def __init__(self, daemon: DaemonProcess, tier: Tier) -> None:
        self.charged_uatp = 0
        self.served = 0
        self.refused: list[Retryable] = []
        with ThreadPoolExecutor(NUM_CLIENTS) as threads:
            for answers in threads.map(self._ask, [(daemon.address, tier)] * NUM_CLIENTS):
                for answer in answers:
                    if isinstance(answer, Retryable):
                        self.refused.append(answer)
                    else:
                        self.served += 1
                        self.charged_uatp += answer

    @staticmethod
    def _ask(given: tuple[str, Tier]) -> list[int | Retryable]:
        """The price of each job, or its refusal; any other ending is raised."""
        address, tier = given
        answers: list[int | Retryable] = []
        with Client(address) as client:
            for _ in range(JOBS_EACH):
                try:
                    answer = client.generate(
                        "count", tier=tier, max_new_tokens=NUM_TOKENS, ignore_eos=True
                    )
                except (QueueFull, RateLimited) as refusal:
                    answers.append(refusal)
                    continue
                assert StopReason.LENGTH is answer.finished.stop_reason
                answers.append(answer.finished.price.charged_uatp)
        return answers


def counted(daemon: DaemonProcess, series: str, *labels: str) -> Counter[tuple[str, ...]]:
    """The values of a series that are not zero, by the values of its labels."""
    page = top.Page.read(top.fetch(daemon.metrics_url), 0.0)
    found: Counter[tuple[str, ...]] = Counter()
    for sample in page.having(f"sage_fed_{series}"):
        if sample.value:
            found[tuple(sample.labels[label] for label in labels)] = int(sample.value)
    return found


@pytest.mark.parametrize("tier", TIER_ROLES)
def test_a_flood_is_refused_with_a_delay_and_for_nothing(daemon: DaemonProcess, tier: Tier) -> None:
    """Each job is served whole or refused; refusals hold and charge nothing and are all counted."""
    flood = Flood(daemon, tier)

    assert NUM_CLIENTS * JOBS_EACH == flood.served + len(flood.refused)
    assert flood.served >= 4
    assert {QueueFull} == set(map(type, flood.refused))
    assert all(refusal.retry_after_s for refusal in flood.refused)
    with Client(daemon.address) as client:
        budget = client.budget()
        assert (0, flood.charged_uatp) == (budget.held_uatp, budget.discharged_uatp)
        refused = len(flood.refused)
        assert {
            (tier.name, "finished", "length"): flood.served,
            (tier.name, "refused", "queue_full"): refused,
        } == counted(daemon, "requests_total", "tier", "outcome", "code")
        answer = client.generate("count", tier=tier, max_new_tokens=4, ignore_eos=True)
        assert StopReason.LENGTH is answer.finished.stop_reason
