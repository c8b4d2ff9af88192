"""Turns the zoo sweep's rows into docs/architectures.md.

python -m benchmarks.zoo_table [RESULTS] [PAGE]
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).resolve().parent

HEAD = """# Architectures

Every model type in four of transformers' auto mappings, by `python -m benchmarks.zoo` with transformers {transformers}
and torch {torch} (rows by commit: {commits}; each row of the JSON file says which).
A tiny random model is built and traced, its axes are analysed, and each family is cut
at random widths and compared with the dense model whose channels are masked. A type is *proven* when every family,
and all of them together, differ by at most 1e-5 of the largest output in fp32 while the mask itself moves the output by
more than 1e-4. The models are random and small, on one CPU thread: this shows that the cut is right, not that a pruned
model is good. The page is made from `benchmarks/results/zoo.json` by `python -m benchmarks.zoo_table`.

"""


def page(result: dict[str, Any]) -> str:
    """The whole page: totals, what stock classes accept, then for each mapping its proven types and all others."""
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
    for mapping in mappings:
        parts += _section(mapping, [row for row in rows if row["mapping"] == mapping])
    return "\n".join(parts) + "\n"


STOCK_HEAD = """
## What the stock classes accept (causal-lm)

Which widths the model's own transformers class can hold, found by probing its config. A family counts as *accepted* at
every width, at *some* widths (a validator or constructor refuses the others), or only *together* with another family
in proportion (one config field serves both); in all three cases the cut weights were loaded into the stock class, whose
logits equal the cut graph's within 1e-5 of the largest. *Differs*: the config is accepted, but the class computes
another function or does not run; the proof in `mptk prune` refuses these. *Refused*: no config field gives the shapes, or
numbers that the class derives would change. {types} types; a type may have several families of a kind. Layers are
not a width: mptk cuts no layers.

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
    output.write_text(page(json.loads(results.read_text())))


if __name__ == "__main__":
    typer.run(main)
