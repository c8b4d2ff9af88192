"""Turns the rows of the zoo sweeps into docs/architectures.md.

python -m benchmarks.zoo_table [RESULTS] [PAGE] [ONNX] [END_TO_END] [DEPTH]
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import zoo_depth
from benchmarks.tiny_models import PICTURED
from benchmarks.zoo_onnx import passed

HERE = Path(__file__).resolve().parent

HEAD = """# Architectures

After this page you can say for each model type of transformers whether mptk cuts it correctly, what its stock class accepts, and
whether it has ONNX. If it does not, you can say why.

Every model type in eight of transformers' auto mappings, and two forecasters, by `python -m benchmarks.zoo` with transformers {transformers} and torch
{torch} (rows by commit: {commits}; each row of the JSON file says which). For each type a tiny random model is built, traced and
analysed. Each family is cut at random widths and compared with the dense model whose channels are masked. A type is *proven*
if every family, and all of them together, differ by at most 1e-5 of the largest output in fp32, while the mask itself moves the
output by more than 1e-4. The models are random and small, on one CPU thread: this shows that the cut is right, not that a
pruned model is good. `python -m benchmarks.zoo_table` makes the page from `benchmarks/results/zoo.json` and `zoo_onnx.json`.

"""


def page(
    result: dict[str, Any], onnx: list[dict[str, Any]], end_to_end: list[dict[str, Any]], depth: list[dict[str, Any]]
) -> str:
    """The whole page: totals, stock classes, blocks, ONNX, then for each mapping its proven types and all others."""
    rows: list[dict[str, Any]] = result["rows"]
    count = Counter(row["commit"] for row in rows)
    commits = ", ".join(f"{commit}: {n}" for commit, n in count.most_common())
    parts = [
        HEAD.format(**result["versions"], commits=commits),
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
    parts += _stock([row for row in rows if "stock" in row])
    parts += _depth(depth)
    parts += _onnx(onnx)
    parts += _end_to_end(end_to_end, {(row["mapping"], row["type"]) for row in rows if row["stage"] == "proven"})
    columns = {"blocks": _stages(depth), "ONNX": _stages(onnx)}
    for mapping in mappings:
        parts += _section(mapping, [row for row in rows if row["mapping"] == mapping], columns)
    return "\n".join(parts) + "\n"


STOCK_HEAD = """
## What the stock classes accept (causal-lm)

Which widths can the model's own transformers class hold? mptk reads it from the class. A family counts as *accepted* at
every width, at *some* widths (a validator or constructor refuses the others), or only *together* with another family in
proportion (one config field serves both). In these three cases the cut weights were loaded into the stock class, and its logits
equal the cut graph's within 1e-5 of the largest. *Differs*: the config is accepted, but the class computes another function or does
not run; the proof in `mptk prune` refuses these. *Refused*: no config field gives the shapes, or numbers that the class
derives would change. There are {types} types; a type may have several families of a kind.

| kind | types | families | every width | some widths | together | differs | refused |
|---|---|---|---|---|---|---|---|"""
VERDICTS = ("every", "some", "together", "differs", "refused")
KINDS = {
    "kv_groups": "KV heads, with their query heads",
    "heads": "heads without KV groups",
    "q_heads": "query heads in each KV group",
    "ffn": "inner channels (feed-forward and others)",
    "hidden": "hidden (residual width and latent widths)",
    "experts": "experts",
    "v_dim": "value channels of a head",
    "qk_dim": "query-key channels of a head",
    "rotary_pairs": "rotary pairs",
    "head_dim": "query, key and value channels of a head",
    "channels": "other channels",
    "layers": "whole residual blocks",
}


def verdict(family: dict[str, Any]) -> str:
    """One word for a family's entry in the stock column."""
    if not family["accepted"]:
        return "refused"
    if family["reloaded"]:
        return "differs"
    if family["with"]:
        return "together"
    return "every" if family["accepted"] == family["of"] else "some"


def _stock(rows: list[dict[str, Any]]) -> list[str]:
    lines = STOCK_HEAD.format(types=len(rows)).splitlines()
    found = [(row["type"], name.split(".")[0], f) for row in rows for name, f in row["stock"].items()]
    for kind, words in KINDS.items():
        mine = [(model_type, verdict(f)) for model_type, k, f in found if k == kind]
        if not mine:
            continue
        counts = Counter(v for _, v in mine)
        cells = [len({t for t, _ in mine}), len(mine), *(counts[v] for v in VERDICTS)]
        lines.append(f"| {words} (`{kind}`) | {' | '.join(map(str, cells))} |")
    lines += ["", "Who refuses (the first refusal of each family):", "", "| kind | by | where | families | types |"]
    lines.append("|---|---|---|---|---|")
    refusals: dict[tuple[str, str, str], list[str]] = {}
    for model_type, kind, f in found:
        if f["by"]:
            refusals.setdefault((kind, f["by"], _where(f)), []).append(model_type)
    order = list(KINDS)
    for (kind, by, where), types in sorted(refusals.items(), key=lambda r: (order.index(r[0][0]), -len(r[1]), r[0])):
        names = list(dict.fromkeys(types))
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        lines.append(f"| {kind} | {by} | {where} | {len(types)} | {shown} |")
    differing = [(r["type"], n, f["reloaded"]) for r in rows for n, f in r["stock"].items() if verdict(f) == "differs"]
    lines += ["", "Accepted, but another function:", "", "| type | family | the stock class |", "|---|---|---|"]
    return lines + [f"| {t} | {name} | {why} |" for t, name, why in differing]


def _where(family: dict[str, Any]) -> str:
    """The refusing validator or constructor line; for shapes and numbers the kind of reason."""
    words: str = family["refusal"]
    if family["by"] in ("validator", "constructor"):
        return f"`{words.split(': ')[0]}`"
    if family["by"] == "numeric":
        return words.split(": ")[1] if "stock class" in words else "a number that the class derives changes"
    return "no config field gives the shapes"


DEPTH_HEAD = """
## Whole residual blocks

By `python -m benchmarks.zoo_depth`: of each list of blocks about 60 % stay, drawn at random. *Proven*: the cut equals the masked model,
as above. *Held*: the model's own class takes fewer blocks of every list, and gives the cut graph's logits. Types that are not listed as
run were not tried yet.

| mapping | types run | analysed | with a list of blocks | proven | held |
|---|---|---|---|---|---|"""


def _depth(rows: list[dict[str, Any]]) -> list[str]:
    lines = DEPTH_HEAD.splitlines()
    for mapping in dict.fromkeys(row["mapping"] for row in rows):
        reached = [zoo_depth.STAGES.index(row["stage"]) for row in rows if row["mapping"] == mapping]
        counts = [sum(r >= i for r in reached) for i in range(len(zoo_depth.STAGES))]
        lines.append(f"| {mapping} | {' | '.join(map(str, counts))} |")
    lines += ["", "Not held:", "", "| mapping | type | last stage | reason |", "|---|---|---|---|"]
    for row in rows:
        if row["stage"] not in ("none", "held"):
            reason = row["reason"].replace("|", "\\|")
            lines.append(f"| {row['mapping']} | {row['type']} | {row['stage']} | {reason} |")
    return lines


ONNX_HEAD = """
## ONNX (causal-lm)

By `python -m benchmarks.zoo_onnx`, for {types} types: one decoding step is traced and compared with the model, and all families are
cut at random legal widths. Then ONNX Runtime runs a prompt of two rows (one padded on the left) and three more tokens. A type is
*equal* if no logit differs from torch's by more than 1e-4 of the largest. In {folded} of the equal types every layer's cache is an
input of `Attention`. In {padding} the padded row also gets the logits that the model gives it alone. In {others} it does not; neither
does the model itself if it takes the same steps in torch: {own}.

| passed | types |
|---|---|"""


def _onnx(rows: list[dict[str, Any]]) -> list[str]:
    equal = [row for row in rows if row["stage"] == "equal"]
    folded = sum(row["folded"] == row["layers"] for row in equal)
    padding = sum(row["padding"] for row in equal)
    own = ", ".join(row["type"] for row in equal if not row["padding"])
    others = len(equal) - padding
    lines = ONNX_HEAD.format(types=len(rows), folded=folded, padding=padding, others=others, own=own).splitlines()
    lines += [f"| {stage} | {count} |" for stage, count in passed(rows).items()]
    lines += ["", "Not equal:", "", "| last stage | reason | types |", "|---|---|---|"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["stage"] != "equal":
            reasons.setdefault((row["stage"], _general(row["reason"])), []).append(row["type"])
    for (stage, reason), types in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {stage} | {reason} | {', '.join(types)} |")
    return lines


END_TO_END_HEAD = """
## Through the command line

By `python -m benchmarks.zoo --end-to-end`: each type is saved as a checkpoint, cut by `mptk prune` to about 60 % of its widths, as a
stock checkpoint or else as a graph, and checked by `mptk verify`. Data are random. What no task takes gets its inputs as a file
([`--inputs`](kinds.md#other-inputs)).

| mapping | types run | proven above | pruned and verified | of them as stock checkpoints |
|---|---|---|---|---|"""


WHY = """MusicGen's decoder reads several rows of codes for a sample, so its rows cannot be taken one by one. transformers saves Nemo's
queries, keys and values as three equal parts, and cannot load this tiny model's, which has fewer keys."""


PICTURED_HEAD = """
Vision-language models (image-text-to-text), which have no table above:

| type | last stage | as | families cut | reason |
|---|---|---|---|---|"""


def _pictured(rows: list[dict[str, Any]]) -> list[str]:
    """A row for each type that reads images with text."""
    lines = PICTURED_HEAD.splitlines() if rows else []
    for row in rows:
        reason = row["reason"].replace("|", chr(92) + "|")
        lines.append(
            f"| {row['type']} | {row['stage']} | {row['target']} | {', '.join(row.get('widths', ()))} | {reason} |"
        )
    return lines


def _end_to_end(rows: list[dict[str, Any]], proven: set[tuple[str, str]]) -> list[str]:
    lines = END_TO_END_HEAD.splitlines()
    for mapping in dict.fromkeys(row["mapping"] for row in rows):
        mine = [row for row in rows if row["mapping"] == mapping]
        verified = [row for row in mine if row["stage"] == "verified"]
        known = sum((mapping, row["type"]) in proven for row in mine)
        stock = sum(row["target"] == "stock" for row in verified)
        lines.append(f"| {mapping} | {len(mine)} | {known} | {len(verified)} | {stock} |")
    lines += _pictured([row for row in rows if row["mapping"] == PICTURED])
    failed = [row for row in rows if row["stage"] != "verified" and (row["mapping"], row["type"]) in proven]
    if failed:
        lines += ["", "Proven above, and not verified here:", "", "| type | last stage | reason |", "|---|---|---|"]
        lines += [f"| {row['type']} | {row['stage']} | {row['reason'].replace('|', chr(92) + '|')} |" for row in failed]
        lines += ["", WHY]
    return lines


def _general(reason: str) -> str:
    """A reason without the names and numbers of one model, as far as they stand in front."""
    reason = re.sub(r"layer \d+ caches", "a layer caches", reason)
    return re.sub(r"\w+ForCausalLM|\w+LMHead\w*", "the model", reason).replace("|", "\\|")


def _stages(rows: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """(mapping, type) → the last stage that it passed."""
    return {(row["mapping"], row["type"]): row["stage"] for row in rows}


def _section(mapping: str, rows: list[dict[str, Any]], columns: dict[str, dict[tuple[str, str], str]]) -> list[str]:
    """``columns``: head → the last stages of another sweep; a column for mappings that have any."""
    others = {head: stages for head, stages in columns.items() if any(key[0] == mapping for key in stages)}

    def line(*cells: str) -> str:
        return f"| {' | '.join(cells)} |"

    def reached(row: dict[str, Any]) -> list[str]:
        return [stages.get((mapping, row["type"]), "not run") for stages in others.values()]

    lines = ["", f"## {mapping}", "", line("type", "families", *others), _rule(2 + len(others))]
    proven = [row for row in rows if row["stage"] == "proven"]
    lines += [line(row["type"], ", ".join(row["names"]), *reached(row)) for row in proven]
    rest = [row for row in rows if row["stage"] != "proven"]
    if rest:
        head = ("type", "last stage", "families proven", "reason")
        lines += ["", "Not proven:", "", line(*head, *others), _rule(4 + len(others))]
    for row in rest:
        reason = row["reason"].replace("|", "\\|")
        families = f"{row['proven']} of {row['families']}"
        lines.append(line(row["type"], row["stage"], families, reason, *reached(row)))
    return lines


def _rule(columns: int) -> str:
    return "|---" * columns + "|"


def main(
    results: Annotated[Path, typer.Argument(help="What benchmarks.zoo --json wrote")] = HERE / "results" / "zoo.json",
    output: Annotated[Path, typer.Argument(help="The page")] = HERE.parent / "docs" / "architectures.md",
    onnx: Annotated[Path, typer.Argument(help="What benchmarks.zoo_onnx --json wrote")] = HERE
    / "results"
    / "zoo_onnx.json",
    end_to_end: Annotated[Path, typer.Argument(help="What benchmarks.zoo --end-to-end --json wrote")] = HERE
    / "results"
    / "zoo_end_to_end.json",
    depth: Annotated[Path, typer.Argument(help="What benchmarks.zoo_depth --json wrote")] = HERE
    / "results"
    / "zoo_depth.json",
) -> None:
    """Write the page of architectures from the sweeps' rows."""
    more = [json.loads(file.read_text())["rows"] for file in (onnx, end_to_end, depth)]
    output.write_text(page(json.loads(results.read_text()), *more))


if __name__ == "__main__":
    typer.run(main)
