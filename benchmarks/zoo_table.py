"""Turns the rows of the zoo sweeps into docs/architectures.md: a row for each model type, and each reason once.

python -m benchmarks.zoo_table [RESULTS] [PAGE] [ONNX] [END_TO_END] [DEPTH]
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import zoo_depth
from benchmarks.tiny_models import model_types
from benchmarks.tiny_wrappers import PICTURED

Row = dict[str, Any]
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

HEAD = """# Architectures

After this page you know which model types of transformers mptk cuts correctly.

For types of 13 mappings of transformers {transformers} (torch {torch}) a tiny random model is analysed (`python -m benchmarks.zoo`). Each
family is cut at random widths. It is *proven* if the outputs differ from the masked dense model's by at most 1e-5 of the largest in fp32, while
the mask itself moves them by more than 1e-4. This shows that the cut is right, not that a pruned model is good. `python -m
benchmarks.zoo_table` makes the page from `benchmarks/results`, whose rows have all reasons.
"""


def page(result: Row, onnx: list[Row], end_to_end: list[Row], depth: list[Row]) -> str:
    """The whole page: a row for each type, then the reasons of each sweep."""
    rows: list[Row] = result["rows"]
    parts = [*HEAD.format(**result["versions"]).splitlines(), *ROWS_HEAD.splitlines()]
    columns = {"blocks": _marks(depth, "depth"), "ONNX": _marks(onnx, "onnx"), "prune": _marks(end_to_end, "prune")}
    for mapping in dict.fromkeys(row["mapping"] for row in rows):
        parts += _section(mapping, [row for row in rows if row["mapping"] == mapping], columns)
    parts += ["", "## Not proven", "", *_reasons(row for row in rows if row["stage"] != "proven")]
    parts += _stock([row for row in rows if "stock" in row])
    parts += _depth(depth)
    parts += _onnx(onnx)
    parts += _end_to_end(end_to_end, {(row["mapping"], row["type"]) for row in rows if row["stage"] == "proven"})
    return "\n".join(parts) + "\n"


# ---- a row for each type ----

ROWS_HEAD = """
## Types

Types without a row could not be analysed ([why](#not-proven)) or were not run. `-`: not run, or nothing to run.

- families: how many are proven: `6` all six, `7/8` seven of eight
- stock: how many of them the [stock class](#what-the-stock-classes-accept-causal-lm) can hold when they are cut
- blocks: [whole blocks](#whole-residual-blocks): `yes` the class holds fewer, `graph` only `--target graph` does, `no`
- ONNX: [a decoder with its KV cache](#onnx-causal-lm) that equals torch
- prune: [through the command line](#through-the-command-line): verified as a `stock` checkpoint, as a `graph`, or `no`"""


MARKS = {
    "depth": lambda row: {"held": "yes", "proven": "graph"}.get(row["stage"], "no"),
    "onnx": lambda row: "yes" if row["stage"] == "equal" else "no",
    "prune": lambda row: row["target"] if row["stage"] == "verified" else "no",
}


def _marks(rows: list[Row], sweep: str) -> dict[tuple[str, str], str]:
    """(mapping, type) → its mark in a column."""
    return {(row["mapping"], row["type"]): MARKS[sweep](row) for row in rows}


def _section(mapping: str, rows: list[Row], columns: dict[str, dict[tuple[str, str], str]]) -> list[str]:
    """``columns``: head → the marks of another sweep; a column for mappings that have any."""
    others = {head: marks for head, marks in columns.items() if any(key[0] == mapping for key in marks)}
    stock = any("stock" in row for row in rows)
    heads = ["type", "families", *(["stock"] if stock else []), *others]
    analysed = [row for row in rows if row["families"]]
    lines = ["", f"### {mapping}", "", _totals(rows)]
    if analysed:
        lines += ["", _line(*heads), "|---" * len(heads) + "|"]
    for row in sorted(analysed, key=lambda row: row["type"]):
        full = row["proven"] == row["families"] and row["stage"] == "proven"
        cells = [row["type"], str(row["proven"]) if full else f"{row['proven']}/{row['families']}"]
        if stock:
            held = [verdict(family) in ("every", "some", "together") for family in row.get("stock", {}).values()]
            cells.append(f"{sum(held)}/{len(held)}" if held else "-")
        cells += [marks.get((mapping, row["type"]), "-") for marks in others.values()]
        lines.append(_line(*cells))
    return lines


def _totals(rows: list[Row]) -> str:
    analysed = sum(row["stage"] in ("analysis", "proven") for row in rows)
    full = sum(row["stage"] == "proven" for row in rows)
    families = f"{sum(row['proven'] for row in rows)} of {sum(row['families'] for row in rows)} families"
    known = len(model_types(rows[0]["mapping"]))
    run = f"{len(rows)} types" if len(rows) == known else f"{len(rows)} of {known} types run"
    return f"{run}, {analysed} analysed, {full} proven in full ({families})."


# ---- reasons ----

SHORT = (
    (r"depends on data|GuardOnDataDependent", "values decide a size or a branch"),
    (r"vacuous", "the mask of some families moves no output, so nothing is shown"),
    (r"wrong by \S+ in fp32, \S+ in fp64", "right in fp64, but rounding in fp32 exceeds 1e-5"),
    (r"^(build|config|forward):|CannotBuild", "no tiny model could be built"),
    (r"fails when it fills its own cache", "the model fails when it fills its own cache"),
    (r"(Exhausted|MachineError): out of memory", "needs more than the 4 GiB of memory that the sweep gives a process"),
    (r"cannot trace", "torch.export cannot trace the model"),
    (r"does not run|^\S+: RuntimeError: view size", "the cut graph does not run"),
    (r"config\.json makes it|has no weights for", "transformers cannot load the dense model's own weights"),
    (r"traced program is not the module", "the trace computes something else than the module"),
)
"""Pattern in a row's reason → the words of the page; the rows have the whole reason."""
STATE = r"caches more or less|no cache (of|that holds only) keys and values"
"""Reasons of types whose cache holds another state than keys and values."""


MOST_NAMED = 50
"""More types than these are counted, not named: the rows have them."""


def _reasons(rows: Iterable[Row]) -> list[str]:
    """A line for each reason, with the types that it concerns, the commonest first."""
    found: dict[str, list[str]] = {}
    for row in rows:
        short = next((words for pattern, words in SHORT if re.search(pattern, row["reason"])), row["reason"])
        found.setdefault(short, []).append(row["type"])
    order = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    return [f"- {reason}: {_name_types(types)}" for reason, types in order]


def _name_types(types: list[str]) -> str:
    found = list(dict.fromkeys(types))
    return ", ".join(found) if len(found) <= MOST_NAMED else f"{len(found)} types"


# ---- stock classes ----

STOCK_HEAD = """
## What the stock classes accept (causal-lm)

The model's own transformers class holds a family at *every* width, at *some* (a validator or constructor refuses the others), or only *together*
with another family in proportion. Then it loaded the cut weights, and its logits equal the cut graph's within 1e-5 of the largest. *Differs*: the
config is accepted, but the class computes another function or does not run; the proof in `mptk prune` refuses these. *Refused*: `mptk analyze`
says why. There are {types} types.

|kind|types|families|every|some|together|differs|refused|
|---|---|---|---|---|---|---|---|"""
VERDICTS = ("every", "some", "together", "differs", "refused")
KINDS = {
    "kv_groups": "KV heads, with their query heads",
    "heads": "heads without KV groups",
    "q_heads": "query heads in each KV group",
    "ffn": "inner channels",
    "hidden": "residual and latent widths",
    "experts": "experts",
    "v_dim": "value channels of a head",
    "qk_dim": "query-key channels of a head",
    "rotary_pairs": "rotary pairs",
    "head_dim": "all channels of a head",
    "channels": "other channels",
    "layers": "whole residual blocks",
}


def verdict(family: Row) -> str:
    """One word for a family's entry in the stock column."""
    if not family["accepted"]:
        return "refused"
    if family["reloaded"]:
        return "differs"
    if family["with"]:
        return "together"
    return "every" if family["accepted"] == family["of"] else "some"


def _stock(rows: list[Row]) -> list[str]:
    lines = STOCK_HEAD.format(types=len(rows)).splitlines()
    found = [(row["type"], name.split(".")[0], f) for row in rows for name, f in row["stock"].items()]
    for kind, words in KINDS.items():
        mine = [(model_type, verdict(f), f) for model_type, k, f in found if k == kind]
        counts = Counter(v for _, v, _ in mine)
        if mine:
            types = len({model_type for model_type, *_ in mine})
            lines.append(_line(f"{words} (`{kind}`)", types, len(mine), *(counts[v] for v in VERDICTS)))
    differing: dict[str, list[str]] = {}
    for model_type, kind, f in found:
        if verdict(f) == "differs":
            differing.setdefault(kind, []).append(model_type)
    lines += ["", "Accepted, but another function:", ""]
    return lines + [f"- {kind}: {', '.join(dict.fromkeys(types))}" for kind, types in differing.items()]


# ---- other sweeps ----

DEPTH_HEAD = """
## Whole residual blocks

By `python -m benchmarks.zoo_depth`: of each list of blocks about 60 % stay, drawn at random. Of {run} types {listed} have a list of blocks. For
{proven} of these the cut equals the masked model, and for {held} the model's own class gives the cut graph's logits."""


def _depth(rows: list[Row]) -> list[str]:
    reached = [zoo_depth.STAGES.index(row["stage"]) for row in rows]
    listed, proven, held = (sum(r >= i for r in reached) for i in range(2, len(zoo_depth.STAGES)))
    return DEPTH_HEAD.format(run=len(rows), listed=listed, proven=proven, held=held).splitlines()


ONNX_HEAD = """
## ONNX (causal-lm)

By `python -m benchmarks.zoo_onnx`, for {types} types: one decoding step is traced and cut in all families at random legal widths. ONNX Runtime
then runs a prompt of two rows (one padded on the left) and three more tokens. For {equal} types no logit differs from torch's by more than 1e-4 of
the largest. (In {different} of them padding changes the logits, in torch, too.) The cache of {state} types holds another state than keys and values.
The others:
"""


def _onnx(rows: list[Row]) -> list[str]:
    equal = [row for row in rows if row["stage"] == "equal"]
    others = [row for row in rows if row["stage"] != "equal" and not re.search(STATE, row["reason"])]
    said = ONNX_HEAD.format(
        types=len(rows),
        equal=len(equal),
        different=sum(not row["padding"] for row in equal),
        state=len(rows) - len(equal) - len(others),
    )
    return [*said.splitlines(), "", *_reasons(others)]


END_TO_END_HEAD = """
## Through the command line

By `python -m benchmarks.zoo --end-to-end`: each type is cut by `mptk prune` to about 60 % of its widths, as a stock checkpoint or else as
a graph, and checked by `mptk verify`, on random data or [`--inputs`](kinds.md#other-inputs).

|mapping|types run|proven above|pruned and verified|of them as stock checkpoints|
|---|---|---|---|---|"""


def _end_to_end(rows: list[Row], proven: set[tuple[str, str]]) -> list[str]:
    lines = END_TO_END_HEAD.splitlines()
    for mapping in dict.fromkeys(row["mapping"] for row in rows):
        mine = [row for row in rows if row["mapping"] == mapping]
        verified = [row for row in mine if row["stage"] == "verified"]
        known = sum((mapping, row["type"]) in proven for row in mine)
        stock = sum(row["target"] == "stock" for row in verified)
        lines.append(_line(mapping, len(mine), known if mapping != PICTURED else "-", len(verified), stock))
    failed = [row for row in rows if row["stage"] != "verified"]
    shown = [row for row in failed if row["mapping"] == PICTURED or (row["mapping"], row["type"]) in proven]
    return [*lines, "", "Proven above or vision-language, and not verified here:", "", *_reasons(shown)]


def _line(*cells: object) -> str:
    return f"|{'|'.join(map(str, cells))}|"


def main(
    results: Annotated[Path, typer.Argument(help="What benchmarks.zoo --json wrote")] = RESULTS / "zoo.json",
    output: Annotated[Path, typer.Argument(help="The page")] = HERE.parent / "docs" / "architectures.md",
    onnx: Annotated[Path, typer.Argument(help="What benchmarks.zoo_onnx --json wrote")] = RESULTS / "zoo_onnx.json",
    end_to_end: Annotated[Path, typer.Argument(help="What benchmarks.zoo --end-to-end --json wrote")] = RESULTS
    / "zoo_end_to_end.json",
    depth: Annotated[Path, typer.Argument(help="What benchmarks.zoo_depth --json wrote")] = RESULTS / "zoo_depth.json",
) -> None:
    """Write the page of architectures from the sweeps' rows."""
    more = [json.loads(file.read_text())["rows"] for file in (onnx, end_to_end, depth)]
    output.write_text(page(json.loads(results.read_text()), *more))


if __name__ == "__main__":
    typer.run(main)
