"""Turns the zoo sweep's rows into docs/architectures.md.

python -m benchmarks.zoo_table [RESULTS] [PAGE]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).resolve().parent

HEAD = """# Architectures

Every model type in four of transformers' auto mappings, from one run of `python -m benchmarks.zoo` with transformers
{transformers} and torch {torch}: a tiny random model is built and traced, its axes are analysed, and each family is cut
at random widths and compared with the dense model whose channels are masked. A type is *proven* when every family,
and all of them together, differ by at most 1e-5 of the largest output in fp32 while the mask itself moves the output by
more than 1e-4. The models are random and small, on one CPU thread: this shows that the cut is right, not that a pruned
model is good. The page is made from `benchmarks/results/zoo.json` by `python -m benchmarks.zoo_table`.

"""


def page(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The whole page: totals, then for each mapping its proven types and, with the reason, all others."""
    parts = [
        HEAD.format(**versions),
        "| mapping | types | analysed | proven in full | families proven |",
        "|---|---|---|---|---|",
    ]
    mappings = list(dict.fromkeys(row["mapping"] for row in rows))
    for mapping in mappings:
        mine = [row for row in rows if row["mapping"] == mapping]
        analysed = sum(row["stage"] in ("analysis", "proven") for row in mine)
        proven = sum(row["stage"] == "proven" for row in mine)
        families = f"{sum(row['proven'] for row in mine)} of {sum(row['families'] for row in mine)}"
        parts.append(f"| {mapping} | {len(mine)} | {analysed} | {proven} | {families} |")
    for mapping in mappings:
        parts += _section(mapping, [row for row in rows if row["mapping"] == mapping])
    return "\n".join(parts) + "\n"


def _section(mapping: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = ["", f"## {mapping}", "", "| type | families |", "|---|---|"]
    lines += [f"| {row['type']} | {', '.join(row['names'])} |" for row in rows if row["stage"] == "proven"]
    others = [row for row in rows if row["stage"] != "proven"]
    if others:
        lines += ["", "Not proven:", "", "| type | last stage | families proven | reason |", "|---|---|---|---|"]
    for row in others:
        reason = row["reason"].replace("|", "\\|")
        lines.append(f"| {row['type']} | {row['stage']} | {row['proven']} of {row['families']} | {reason} |")
    return lines


def main(
    results: Annotated[Path, typer.Argument(help="What benchmarks.zoo --json wrote")] = HERE / "results" / "zoo.json",
    output: Annotated[Path, typer.Argument(help="The page")] = HERE.parent / "docs" / "architectures.md",
) -> None:
    """Write the page of architectures from the sweep's rows."""
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
    output.write_text(page(json.loads(results.read_text()), versions))


if __name__ == "__main__":
    typer.run(main)
