"""A checkpoint's chat template: a conversation to the text that its model was trained on.

Owns the sandbox that the template runs in, which offers what `transformers` offers, no more: a
template comes with the checkpoint, so it is foreign code. Every literal of the template is `Traced`
as its own, so what is printed says which characters are the template's and which a client's.
Knows no tokens.
Fails with `TemplateError`, `ValueError` or `TypeError` where the template does, also while it is
compiled, which happens at its first use: a checkpoint whose template is broken still completes
token ids.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

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

from sage_fed.text.traced import Traced, joined


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
