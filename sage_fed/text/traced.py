"""Text that knows which of its characters the chat template wrote.

Owns the rule that what is not known to be the template's is the client's: a plain `str` is, and so
is the result of any operation that is not followed here. A missed operation can make a control
token plain text, never plain text a control token. Knows no templates and no tokens. Cannot fail
where `str` does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Self, SupportsIndex

Spans = tuple[tuple[int, int], ...]
"""(start, end) of runs of characters, ascending; no two of them touch."""

_PERCENT = re.compile(r"%(?:(%)|s)")


class Traced(str):
    """A string with the spans that a template wrote; without any it is all the client's.

    Every operation gives the text that `str` gives. Those that templates join and cut text with
    carry the spans along; any other returns a plain `str`.
    """

    __slots__ = ("_spans",)
    # Underscored: the sandbox keeps templates from it.
    _spans: Spans

    def __new__(cls, text: str = "", spans: Spans = ()) -> Self:  # noqa: D102 - see the class
        self = super().__new__(cls, text)
        self._spans = spans
        return self

    @classmethod
    def own(cls, text: str) -> Traced:
        """Return text that is all the template's."""
        return cls(text, ((0, len(text)),) if text else ())

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
        return self._spans == ((0, len(self)),)

    def _cut(self, start: int, stop: int) -> Traced:
        spans = ((max(first, start), min(last, stop)) for first, last in self._spans)
        kept = tuple((first - start, last - start) for first, last in spans if first < last)
        return Traced(str.__getitem__(self, slice(start, max(start, stop))), kept)

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
        """Return `text` with these spans, where letters have kept their places."""
        if self._whole:
            return Traced.own(text)
        return Traced(text, self._spans if len(text) == len(self) else ())


def spans_of(text: str) -> Spans:
    """Return the runs of characters that the template wrote."""
    return text._spans if isinstance(text, Traced) else ()  # noqa: SLF001 - the class's own


def own_text(text: str) -> str:
    """Return what the template wrote, each run on lines of its own."""
    return "\n".join(str.__getitem__(text, slice(*span)) for span in spans_of(text))


def joined(texts: Iterable[str]) -> Traced:
    """Return the texts one after the other."""
    pieces = list(texts)
    spans: list[tuple[int, int]] = []
    at = 0
    for piece in pieces:
        for first, last in spans_of(piece):
            if spans and spans[-1][1] == at + first:
                spans[-1] = (spans[-1][0], at + last)
            else:
                spans.append((at + first, at + last))
        at += len(piece)
    return Traced("".join(pieces), tuple(spans))


def _foreign(other: object) -> bool:
    """Whether another type's own rules apply: no text, or markup, which escapes."""
    return not isinstance(other, str) or hasattr(other, "__html__")
