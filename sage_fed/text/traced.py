"""Text that knows which of its characters the chat template wrote.

Owns the rule that what is not known to be the template's is the client's: a plain `str` is, and so
is the result of any operation that is not followed here. A missed operation can make a control
token plain text, never plain text a control token. Knows no templates and no tokens. Cannot fail
where `str` does not.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self, SupportsIndex

Edges = tuple[int, ...]
"""Where the template's own characters begin and end, in turn; strictly ascending.

Flat, so that a place is found by bisection in C: a message may have cut a text into very many.
"""

_PERCENT = re.compile(r"%(?:(%)|s)")


class Traced(str):
    """A string that knows which of its characters a template wrote; without `edges`, none.

    Every operation gives the text that `str` gives. Those that templates join and cut text with
    keep the knowledge; any other returns a plain `str`.
    """

    __slots__ = ("_edges",)
    # Underscored: the sandbox keeps templates from it.
    _edges: Edges

    def __new__(cls, text: str = "", edges: Edges = ()) -> Self:  # noqa: D102 - see the class
        self = super().__new__(cls, text)
        self._edges = edges
        return self

    @classmethod
    def own(cls, text: str) -> Traced:
        """Return text that is all the template's."""
        return cls(text, (0, len(text)) if text else ())

    def __str__(self) -> str:
        # Jinja passes whatever it prints through `str()`.
        return self

    def __add__(self, other: str) -> Traced:
        return NotImplemented if _foreign(other) else joined((self, other))

    def __radd__(self, other: str) -> Traced:
        return NotImplemented if _foreign(other) else joined((other, self))

    def __mul__(self, count: SupportsIndex) -> Traced:
        text = str.__mul__(self, count)
        return Traced.own(text) if self._whole else joined([self] * (len(text) // len(self or "x")))

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:  # noqa: ANN401 - as str has it
        text = str.__mod__(self, values)
        if "%" in _PERCENT.sub("", self):
            return text  # another directive
        fields = values if isinstance(values, tuple) else (values,)
        pieces: list[str] = []
        position, field = 0, iter(fields)
        for hit in _PERCENT.finditer(self):
            pieces.append(self[position : hit.start()])
            pieces.append(Traced.own("%") if hit[1] else str(next(field, "")))
            position = hit.end()
        return joined([*pieces, self[position:]])

    def __getitem__(self, key: SupportsIndex | slice) -> Traced:
        text = str.__getitem__(self, key)
        if self._whole:
            return Traced.own(text)
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            return self._cut(start, stop) if step == 1 else Traced(text)
        at = key.__index__()
        return self._cut(at := at + len(self) if at < 0 else at, at + 1)

    def join(self, texts: Iterable[str]) -> Traced:
        """As `str` does."""
        pieces: list[str] = []
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"expected str instance, {type(text).__name__} found")
            pieces += (self, text)
        return joined(pieces[1:])

    def strip(self, chars: str | None = None) -> Traced:
        """As `str` does."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> Traced:
        """As `str` does."""
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None) -> Traced:
        """As `str` does."""
        return self._cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> Traced:
        """As `str` does."""
        return self._cut(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> Traced:
        """As `str` does."""
        return self._cut(0, len(str.removesuffix(self, suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str` does."""
        return self._pieces(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        """As `str` does."""
        return self._pieces(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        """As `str` does."""
        lines: list[str] = []
        start = 0
        for line in str.splitlines(self, keepends=True):
            kept = line if keepends else str.splitlines(line)[0]
            lines.append(self._cut(start, start + len(kept)))
            start += len(line)
        return lines

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        """As `str` does."""
        head, _, tail = str.partition(self, sep)
        return self._around(len(head), len(self) - len(tail))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        """As `str` does."""
        head, _, tail = str.rpartition(self, sep)
        return self._around(len(head), len(self) - len(tail))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Traced:
        """As `str` does."""
        if not old:
            return Traced(str.replace(self, old, new, count))
        kept = self._pieces(str.split(self, old, count), len(old))
        return joined([piece for text in kept for piece in (new, text)][1:])

    def upper(self) -> Traced:
        """As `str` does."""
        return self._recast(str.upper(self))

    def lower(self) -> Traced:
        """As `str` does."""
        return self._recast(str.lower(self))

    def capitalize(self) -> Traced:
        """As `str` does."""
        return self._recast(str.capitalize(self))

    def title(self) -> Traced:
        """As `str` does."""
        return self._recast(str.title(self))

    @property
    def _whole(self) -> bool:
        return self._edges == (0, len(self))

    def _cut(self, start: int, stop: int) -> Traced:
        if start >= stop:
            return Traced()
        text = str.__getitem__(self, slice(start, stop))
        first = bisect_right(self._edges, start)
        last = bisect_left(self._edges, stop, first)
        # An odd number of edges before a place: it is inside the template's own text.
        opened, closed = (0,) * (first % 2), (len(text),) * (last % 2)
        return Traced(text, (*opened, *(edge - start for edge in self._edges[first:last]), *closed))

    def _around(self, start: int, stop: int) -> tuple[str, str, str]:
        return self._cut(0, start), self._cut(start, stop), self._cut(stop, len(self))

    def _pieces(self, texts: Sequence[str], gap: int) -> list[str]:
        """Return `texts`, cut out of this string in order; `gap` characters apart, or by space."""
        pieces: list[str] = []
        start = 0
        for text in texts:
            start = start if gap else self.find(text, start)
            pieces.append(self._cut(start, start + len(text)))
            start += len(text) + gap
        return pieces

    def _recast(self, text: str) -> Traced:
        """Return `text` with these edges, where letters have kept their places."""
        if self._whole:
            return Traced.own(text)
        return Traced(text, self._edges if len(text) == len(self) else ())


def spans_of(text: str) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each run of characters that the template wrote; no two touch."""
    edges = _edges_of(text)
    return zip(edges[::2], edges[1::2], strict=True)


def own_text(text: str) -> str:
    """Return what the template wrote, each run on lines of its own."""
    return "\n".join(str.__getitem__(text, slice(*span)) for span in spans_of(text))


def joined(texts: Iterable[str]) -> Traced:
    """Return the texts one after the other."""
    pieces = list(texts)
    edges: list[int] = []
    at = 0
    for piece in pieces:
        if own := _edges_of(piece):
            if edges and edges[-1] == at + own[0]:
                edges.pop()
                own = own[1:]
            edges += [at + edge for edge in own]
        at += len(piece)
    return Traced("".join(pieces), tuple(edges))


def _edges_of(text: str) -> Edges:
    return text._edges if isinstance(text, Traced) else ()  # noqa: SLF001 - the class's own


def _foreign(other: object) -> bool:
    """Whether another type's own rules apply: no text, or markup, which escapes."""
    return not isinstance(other, str) or hasattr(other, "__html__")
