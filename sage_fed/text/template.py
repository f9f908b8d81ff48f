"""A checkpoint's chat template: a conversation to the text that its model was trained on.

Owns the sandbox that the template runs in, which offers what `transformers` offers, no more: a
template comes with the checkpoint, so it is foreign code. Owns also `Traced`, text that knows
which of its characters the template wrote. What is not known to be the template's is the client's:
a plain `str` is, and so is the result of any operation that `Traced` does not follow. A missed
operation can make a control token plain text, never plain text a control token.
Knows no tokens.
Fails with `TemplateError`, `ValueError` or `TypeError` where the template does, also while it is
compiled, which happens at its first use: a checkpoint whose template is broken still completes
token ids.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn, Self, SupportsIndex

from jinja2 import Template, TemplateError, nodes, pass_eval_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import sync_do_join
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

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

    def __new__(cls, text: str = "", edges: Edges = ()) -> Self:
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
        pieces: list[str] = []
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"expected str instance, {type(text).__name__} found")
            pieces += (self, text)
        return joined(pieces[1:])

    def strip(self, chars: str | None = None) -> Traced:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> Traced:
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None) -> Traced:
        return self._cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> Traced:
        return self._cut(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> Traced:
        return self._cut(0, len(str.removesuffix(self, suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.split(self, sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.rsplit(self, sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines: list[str] = []
        start = 0
        for line in str.splitlines(self, keepends=True):
            kept = line if keepends else str.splitlines(line)[0]
            lines.append(self._cut(start, start + len(kept)))
            start += len(line)
        return lines

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        head, _, tail = str.partition(self, sep)
        return self._around(len(head), len(self) - len(tail))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        head, _, tail = str.rpartition(self, sep)
        return self._around(len(head), len(self) - len(tail))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> Traced:
        if not old:
            return Traced(str.replace(self, old, new, count))
        kept = self._pieces(str.split(self, old, count), len(old))
        return joined([piece for text in kept for piece in (new, text)][1:])

    def upper(self) -> Traced:
        return self._recast(str.upper(self))

    def lower(self) -> Traced:
        return self._recast(str.lower(self))

    def capitalize(self) -> Traced:
        return self._recast(str.capitalize(self))

    def title(self) -> Traced:
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


class ChatTemplate:
    """A compiled template; `named` are the tokens that it may write by name (`eos_token`)."""

    def __init__(self, source: str, named: Mapping[str, str]) -> None:
        self.source = source
        self._named = {name: Traced.own(token) for name, token in named.items()}

    def render(self, turns: Sequence[tuple[str, str]]) -> Traced:
        """Return the text of (role, content) turns, opened for the assistant's answer.

        A role counts as the template's text: the caller has checked that it is one of a few words.
        """
        text = self._template.render(
            messages=[{"role": Traced.own(role), "content": content} for role, content in turns],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **self._named,
        )
        assert isinstance(text, Traced), "the environment joins what it prints"
        return text

    @cached_property
    def _template(self) -> Template:
        return _Environment().from_string(self.source)


class _CodeGenerator(CodeGenerator):
    """Writes a template's literals as the `Traced` strings that its environment keeps."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:  # noqa: N802 - jinja's
        self.write(self._traced(node.as_const(frame.eval_ctx)))

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:  # noqa: N802 - jinja's
        self.write(self._traced(node.as_const(frame.eval_ctx)))

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - jinja's
        self.write("environment.concat((")
        for arg in node.nodes:
            self.write("str(")
            self.visit(arg, frame)
            self.write("), ")
        self.write("))")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return self._traced("".join(group))

    def _traced(self, value: object) -> str:
        """Return the expression for a constant; one that was folded may hold others."""
        if isinstance(value, str):
            assert isinstance(self.environment, _Environment), "no other generates with this class"
            literals = self.environment.literals
            literals.append(Traced.own(value))
            return f"environment.literals[{len(literals) - 1}]"
        if isinstance(value, tuple):
            return f"({''.join(f'{self._traced(item)}, ' for item in value)})"
        if isinstance(value, list):
            return f"[{', '.join(map(self._traced, value))}]"
        if isinstance(value, dict):
            items = (f"{self._traced(k)}: {self._traced(v)}" for k, v in value.items())
            return f"{{{', '.join(items)}}}"
        return str(value) if isinstance(value, float) else repr(value)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with the template's own text traced."""

    code_generator_class = _CodeGenerator
    concat = staticmethod(joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self.literals: list[Traced] = []
        self.filters |= {"tojson": _to_json, "join": _join}
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


class _Dict:
    """`dict(...)` without the class's attributes, which lead out of the sandbox."""

    def __call__(self, *args: Any, **named: Any) -> dict[Any, Any]:  # noqa: ANN401 - the template's
        return dict(*args, **named)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:  # noqa: ANN401 - as above
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace(...)` that takes no name of the interpreter's own."""

    def __init__(*args: Any, **named: Any) -> None:  # noqa: ANN401 - `self` may be a name
        self, *rest = args
        values = dict(*rest, **named)
        for name in values:
            _require_plain(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:  # noqa: ANN401 - the template's
        _require_plain(name)
        super().__setitem__(name, value)


def _require_plain(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have an attribute {name!r}")


def _to_json(
    value: Any,  # noqa: ANN401 - the template's
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a model would have to unlearn.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@pass_eval_context
def _join(
    context: EvalContext,
    value: Iterable[Any],
    d: str = "",
    attribute: str | int | None = None,
) -> str:
    # The default, too, is the template's: a plain separator would make all of it the client's.
    return sync_do_join(context, value, d or Traced(), attribute)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return dt.datetime.now().astimezone().strftime(form)
