"""Prometheus metrics that find a labelled child again without building its key anew.

Owns the children by the label values as they were given. A job asks for some twenty children,
and each `labels` of the library turns every value into a string and takes a lock.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, Self

import prometheus_client
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.samples import Exemplar


class _Kept(MetricWrapperBase):
    """Remembers what `labels` returned for values that are given by position."""

    def labels(self, *labelvalues: Any, **labelkwargs: Any) -> Self:  # noqa: ANN401 - as the base
        if labelkwargs:
            return super().labels(*labelvalues, **labelkwargs)
        children: dict[tuple[Any, ...], Self] = self.__dict__.setdefault("_children", {})
        child = children.get(labelvalues)
        if child is None:
            child = children[labelvalues] = super().labels(*labelvalues)
        return child

    def remove(self, *labelvalues: Any) -> None:  # noqa: ANN401 - as the base
        self.__dict__.pop("_children", None)
        super().remove(*labelvalues)

    def clear(self) -> None:
        # A child of before would go on being set, and never be scraped again.
        self.__dict__.pop("_children", None)
        super().clear()


class Counter(_Kept, prometheus_client.Counter):
    """A counter."""


class Gauge(_Kept, prometheus_client.Gauge):
    """A gauge."""


class Histogram(_Kept, prometheus_client.Histogram):
    """A histogram that finds its bucket by bisection, and takes equal observations together."""

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        """Observe an amount; the library's own way looks at every bucket below it."""
        if exemplar is None:
            self.observe_many(amount, 1)
        else:
            super().observe(amount, exemplar)

    def observe_many(
        self, amount: float, count: int, exemplar: Mapping[str, str] | None = None
    ) -> None:
        """Observe the same amount `count` times, at the price of once.

        Args:
            amount: what was observed.
            count: how often.
            exemplar: labels that lead to one case of it; at most 128 characters in all.
        """
        self._sum.inc(amount * count)
        # The last bucket's bound is infinite.
        bucket = self._buckets[bisect_left(self._upper_bounds, amount)]
        bucket.inc(count)
        if exemplar is not None:
            bucket.set_exemplar(Exemplar(dict(exemplar), amount, time.time()))
