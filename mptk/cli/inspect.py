"""inspect: commands that print the compiler's passes, and a program as text."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated

import typer

from mptk.cli.app import command
from mptk.cli.console import echo, err
from mptk.cli.options import Model
from mptk.cli.progress import stages
from mptk.config.settings import Settings


@command("passes", examples=("passes",))
def list_passes() -> None:
    """List the passes of each pipeline in order: what each does, requires and ensures."""
    from onnx_ir.passes import PassBase

    from passes.pipelines import LISTS

    for pipeline in LISTS:
        # A pipeline stores its arguments without using them, so None will do.
        steps = pipeline(*[None] * len(inspect.signature(pipeline).parameters))
        echo(f"{pipeline.__name__.replace('_', ' ')}: {_summary(pipeline)}")
        for step in steps:
            echo(f"  {getattr(step, 'name', type(step).__name__)}: {_summary(type(step))}")
            for condition in ("requires", "ensures"):
                method = getattr(type(step), condition)
                if method.__doc__ and method is not getattr(PassBase, condition):  # the base class checks nothing
                    echo(f"    {condition}: {_summary(method)}")


def _summary(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


@command("show", examples=("show smollm2-135m", "show smollm2-135m --after rewrite --plan runs/m30/plan.json"))
def show_program(
    model: Model,
    settings: Settings,
    after: Annotated[
        str | None,
        typer.Option(help="Show it after this pass of `mptk passes`: rewrite, 'remove blocks', 'fold norms' or mask."),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="The plan.json that the pass cuts to.")] = None,
    source: Annotated[bool, typer.Option("--source", help="Add the line of the model's source to each call.")] = False,
) -> None:
    """Print a model's program: one line for each value, with its axes. Reads no weights."""
    from mptk.api import compiler as api
    from mptk.io import models
    from mptk.ir.plan import Plan

    chosen = None if plan is None else Plan.load(plan)
    with stages(err) as progress:
        progress("trace", 0, 0)
        skeleton = models.skeleton(model, trust_remote_code=settings.trust_remote_code)
        text = api.show(skeleton, after=after, plan=chosen, source=source)
    echo(text, end="")
