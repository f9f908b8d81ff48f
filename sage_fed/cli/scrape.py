"""Reading what the daemon shows to Prometheus.

Owns: one HTTP GET of a metrics page, and picking samples out of its text.
Does not know: which series exist (that is `metrics.py`), typed parsing beyond name, labels, value.
Fails: `OSError` or `http.client.HTTPException` where the page cannot be read, `NotAdmitted` of them
where a token would help.
"""

from __future__ import annotations

import http.client
import re
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

_TIMEOUT_S = 10.0
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of the page."""

    name: str
    labels: Mapping[str, str]
    value: float
    line: str


class NotAdmitted(http.client.HTTPException):
    """The page is there, and not for whoever asks."""


def fetch(url: str, token: str | None = None, tls_ca: Path | None = None) -> str:
    """The text of a metrics page such as `http://127.0.0.1:9659/metrics`.

    Over https the daemon is trusted by `tls_ca`, or without it by this system's certificates.
    """
    parts = urlsplit(url)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        trust = ssl.create_default_context(cafile=tls_ca)
        connection = http.client.HTTPSConnection(parts.netloc, timeout=_TIMEOUT_S, context=trust)
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=_TIMEOUT_S)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request("GET", parts.path or "/metrics", headers=headers)
        response = connection.getresponse()
        body = response.read().decode()
        if response.status in {http.client.UNAUTHORIZED, http.client.FORBIDDEN}:
            raise NotAdmitted(f"{url} wants the token of a monitor or an admin")
        if response.status != http.client.OK:
            raise http.client.HTTPException(
                f"{url} answered {response.status} {response.reason}".rstrip()
            )
        return body
    finally:
        connection.close()


def samples(text: str) -> Iterator[Sample]:
    """Every sample of the page, in its order."""
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match:
            labels = dict(_LABEL.findall(match["labels"] or ""))
            yield Sample(match["name"], labels, float(match["value"]), line)


def total(text: str, name: str, **labels: str) -> float:
    """The sum of a series over all labels but the given ones; 0.0 where there is none."""
    return sum(
        sample.value
        for sample in samples(text)
        if sample.name == name and labels.items() <= sample.labels.items()
    )
