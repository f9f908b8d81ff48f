"""A checkpoint's chat template: a conversation to the text that its model was trained on.

Owns the sandbox that the template runs in, which offers what `transformers` offers, no more: a
template comes with the checkpoint, so it is foreign code. Knows no tokens.
Fails with `TemplateError`, `ValueError` or `TypeError` where the template does, also while it is
compiled, which happens at its first use: a checkpoint whose template is broken still completes
token ids.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class ChatTemplate:
    """A compiled template; `named` are the tokens that it may write by name (`eos_token`)."""

    def __init__(self, source: str, named: Mapping[str, str]) -> None:
        self._source = source
        self._named = dict(named)

    @property
    def timeless(self) -> bool:
        """Whether the same turns always give the same text; a template may ask for the date."""
        return "strftime_now" not in self._source

    def render(self, turns: Sequence[tuple[str, str]]) -> str:
        """Return the text of (role, content) turns, opened for the assistant's answer."""
        return self._template.render(
            messages=[{"role": role, "content": content} for role, content in turns],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **self._named,
        )

    @cached_property
    def _template(self) -> Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        return environment.from_string(self._source)


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


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return dt.datetime.now().astimezone().strftime(form)
