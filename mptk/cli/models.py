"""models: commands that read no weights: ops, passes, a model's analysis and its program."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from mptk.cli.app import announce_reading, register_command, show_result
from mptk.cli.console import err, print_text, show_stages
from mptk.cli.options import JsonOption, ModelArgument
from mptk.config import Settings

if TYPE_CHECKING:
    from mptk.ir import Analysis
    from passes.targets.legalize import LegalWidths

OPS = "mptk-ops/1"


@register_command("ops", examples=("ops --json -",))
def list_ops(json_file: JsonOption = None) -> None:
    """List the ops that have an axis rule, each with the rule's file and axis equation."""
    from passes.analysis.rules import list_rules

    rules = list_rules()
    show_result(json_file, {"format": OPS, "ops": rules}, _build_ops_table(rules))


def _build_ops_table(ops: Sequence[Mapping[str, str]]) -> Table:
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


@register_command("passes", examples=("passes",))
def list_passes() -> None:
    """List the passes of each pipeline in order: what each does, requires and ensures."""
    from onnx_ir.passes import PassBase

    from passes.pipelines import LISTS

    for pipeline in LISTS:
        # A pipeline is a function that makes a list of passes. It only stores its arguments, so None will do.
        steps = pipeline(*[None] * len(inspect.signature(pipeline).parameters))
        print_text(f"{pipeline.__name__.replace('_', ' ')}: {_read_summary(pipeline)}")
        for step in steps:
            print_text(f"  {getattr(step, 'name', type(step).__name__)}: {_read_summary(type(step))}")
            for condition in ("requires", "ensures"):
                method = getattr(type(step), condition)
                if method.__doc__ and method is not getattr(PassBase, condition):  # the base class checks nothing
                    print_text(f"    {condition}: {_read_summary(method)}")


def _read_summary(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n")[0]


@register_command(
    "analyze", examples=("analyze smollm2-135m", "analyze models/mine --target graph --json analysis.json")
)
def show_analysis(
    model: ModelArgument,
    settings: Settings,
    json_file: JsonOption = None,
) -> None:
    """Show what can be cut, to which widths, and why the rest cannot. Reads no weights."""
    announce_reading(model, json_file=json_file)
    from mptk.report.analysis import build_analysis_view

    result, *_ = analyze_model(model, settings)
    show_result(json_file, result, build_analysis_view(result))


def analyze_model(model: str, settings: Settings) -> tuple[dict[str, object], Analysis, LegalWidths]:
    """What ``analyze`` shows, as JSON, with the analysis and the legal widths that it is made of."""
    from mptk.api import compiler as api
    from mptk.io import models
    from mptk.ir import check_engines
    from mptk.methods.division.budget import build_alignment
    from mptk.methods.division.selection import build_part_rows, check_aligned
    from mptk.report.analysis import build_analysis_json
    from mptk.targets import find_target
    from mptk.tasks import match_task
    from mptk.tasks.module import make_example_samples, read_inputs

    # A model without weights on torch's meta device is enough for the analysis, and takes no memory.
    check_engines(settings.engines, settings.target)
    with show_stages(err) as progress:
        progress("trace", 0, 0)
        skeleton = models.build_skeleton(model, trust=settings.trust)
        example = (
            None if settings.inputs is None else make_example_samples(skeleton, read_inputs(settings.inputs)).inputs
        )
        analysis = api.analyze(skeleton, example)
        check_aligned(analysis, settings)
        progress("legal widths", 0, 0)
        found = find_target(settings.target).find_legal(analysis, skeleton, build_alignment(settings))
    # A task may name parts of the model (an image encoder) that stand for families.
    task = match_task(skeleton)
    parts = {} if task is None else task.name_parts(skeleton)
    rows = build_part_rows(skeleton, analysis, parts)
    return build_analysis_json(analysis, found, model, rows), analysis, found


def check_show(after: str | None, plan: Path | None) -> None:
    """Check the options of ``show``."""
    from mptk.api.compiler import check_pass

    check_pass(after, plan)


@register_command(
    "show",
    check=check_show,
    examples=("show smollm2-135m", "show smollm2-135m --after rewrite --plan runs/m30/plan.json"),
)
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
    from mptk.ir import Plan

    chosen = None if plan is None else Plan.load(plan)
    with show_stages(err) as progress:
        progress("trace", 0, 0)
        skeleton = models.build_skeleton(model, trust=settings.trust)
        text = api.show(skeleton, after=after, plan=chosen, source=source)
    print_text(text, end="")
