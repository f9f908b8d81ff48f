"""`sage-fed dev ...`: for whoever measures or develops sage-fed itself.

Owns: writing a checkpoint that stands in for a real one, and saying beforehand what it takes.
Does not know: shapes, tensors and tokenizers (`sage_fed.engine`, `sage_fed.text`).
Fails: exit codes of `exits.py`; what was begun is removed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from sage_fed.cli import options
from sage_fed.cli.exits import EXIT_CODES_HELP, reported
from sage_fed.cli.render import format_bytes, format_seconds, print_json
from sage_fed.cli.streams import leave_on_interrupt

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Where to; it must not be there.")]
Like = Annotated[
    str,
    typer.Option("--like", metavar="SHAPE", help="qwen2.5-0.5b, -1.5b, -3b, -7b or -14b."),
]
Layers = Annotated[
    int | None, typer.Option("--layers", min=1, metavar="N", help="Fewer layers, for a quick test.")
]
WeightType = Annotated[
    str,
    typer.Option("--dtype", metavar="TYPE", help="bf16, fp16 or fp32: the type of the weights."),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, metavar="N", help="Another one, other weights.")
]


def dev_app() -> typer.Typer:
    """The developer's commands."""
    app = typer.Typer(
        name="dev",
        invoke_without_command=True,
        callback=options.help_if_bare,
        help="Tools for measuring and developing sage-fed itself.",
        epilog=EXIT_CODES_HELP,
    )
    app.command(epilog=EXIT_CODES_HELP)(make_checkpoint)
    return app


def make_checkpoint(
    directory: Directory,
    *,
    like: Like,
    layers: Layers = None,
    weight_type: WeightType = "bf16",
    seed: Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Write random weights in a real model's shape, for speed tests.

    It can be served like the real one and costs the same: its tokenizer has as many ids, most
    of them invented words. No token ends an answer, and what it says means nothing.
    """
    with leave_on_interrupt():
        from sage_fed.cli.progress import watched_bar  # noqa: PLC0415 - a tenth of a second
        from sage_fed.engine import (  # noqa: PLC0415 - torch takes seconds to import
            SHAPES,
            WEIGHT_TYPES,
            check_destination,
            free_bytes,
            plan_checkpoint,
            write_checkpoint,
        )
        from sage_fed.text import write_padded_tokenizer  # noqa: PLC0415 - as above
    _check("--like", like, tuple(SHAPES))
    _check("--dtype", weight_type, WEIGHT_TYPES)
    shape = SHAPES[like]
    if layers is not None and layers > shape.layers:
        raise typer.BadParameter(
            f"{layers} are more than the {shape.layers} of {like}", param_hint="--layers"
        )
    plan = plan_checkpoint(shape, num_layers=layers, weight_type=weight_type)
    tokenizer = Path(__file__).parent.parent / "models" / "demo-tactical"
    with reported(as_json=as_json):
        check_destination(plan, directory)
        if not as_json:
            typer.echo(
                f"{like}: {plan.parameters:,} parameters, {format_bytes(plan.num_bytes)} in "
                f"{len(plan.shards)} file(s); {format_bytes(free_bytes(directory))} are free",
                err=True,
            )
        began_s = time.monotonic()
        with watched_bar(as_json=as_json) as show:
            write_checkpoint(
                plan,
                directory,
                seed=seed,
                progress=lambda done: show(done / plan.num_bytes, format_bytes(done)),
                complete=lambda made: write_padded_tokenizer(tokenizer, made, shape.tokenizer_ids),
            )
        took_s = time.monotonic() - began_s
    if as_json:
        print_json(
            {
                "directory": directory,
                "like": like,
                "layers": plan.shape.layers,
                "parameters": plan.parameters,
                "num_bytes": plan.num_bytes,
                "seconds": took_s,
            }
        )
        return
    typer.echo(f"wrote {directory} in {format_seconds(took_s)}")


def _check(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise typer.BadParameter(f"{value!r} is not one of {', '.join(allowed)}", param_hint=option)
