"""command: ``--html`` of ``mptk report`` and of ``mptk analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from mptk.cli.app import extend_command, show_result
from mptk.cli.console import out
from mptk.cli.models import analyze_model
from mptk.cli.options import DenseOption, JsonOption, make_file_option
from mptk.cli.verify import read_runs_to_show
from mptk.config import Settings
from mptk.files import write_text


@extend_command(
    "report",
    after="folders",
    examples=(
        "report runs/m30 runs/w30 --html report.html",
        'report runs/m30 --prompt "Once upon a time" --html report.html',
    ),
)
def write_report_page(
    folders: list[Path],
    html: Annotated[Path | None, make_file_option("Write a page with charts to this file instead.", "page")] = None,
    prompt: list[str] | None = None,
    model: DenseOption = None,
    *,
    settings: Settings,
) -> None:
    """Write the page about pruned folders."""
    from mptk.features.page.render import render_report_page

    assert html is not None, "the command has the option"
    write_text(html, render_report_page(read_runs_to_show(folders, prompt, model, settings)))
    out.print(f"written to {html}", soft_wrap=True)


@extend_command("analyze", after="json_file")
def write_analysis_page(
    model: str,
    settings: Settings,
    json_file: JsonOption = None,
    html: Annotated[
        Path | None,
        make_file_option(
            "Also write a page to this file that draws which matrices of a layer are cut together.", "page"
        ),
    ] = None,
) -> None:
    """Write the page about a layer beside the analysis."""
    from mptk.features.page.render import render_analysis_page
    from mptk.report.analysis import build_analysis_view

    assert html is not None, "the command has the option"
    result, analysis, legal = analyze_model(model, settings)
    write_text(html, render_analysis_page(result, analysis, legal))
    show_result(json_file, result, build_analysis_view(result))
