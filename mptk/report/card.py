"""card: ``README.md`` of a pruned folder: what it is, what was cut, how good it is, its proof, how to load it.

Its first lines are the metadata of a model hub. Names and words that come from models or files stand in code spans, so
that they cannot become markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers.modelcard import TASK_MAPPING

from mptk.files import write_text
from mptk.io.packaged import ALIASES
from mptk.protocols.chain import Compiled
from mptk.protocols.report import Report
from mptk.publish import licence
from mptk.publish.licence import CARD
from mptk.publish.markdown import code, table
from mptk.report.card_usage import auto_of, flattened, onnx_graphs, usage

FEATURES = {"pixel_values": "image-feature-extraction"}
"""Main input of a bare encoder → the hub's name of its task; that of others is feature-extraction."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)


def write_card(report: Report, compiled: Compiled, folder: Path) -> None:
    """Write ``README.md``. ``folder``: with all other files. ``report``: its quality may still be unknown."""
    data = metadata(report, compiled, folder)
    parts = (
        title(report),
        cut(report),
        quality(report),
        proof(report),
        *usage(report, compiled, folder),
        notes(report),
    )
    body = "\n\n".join(part for part in parts if part)
    write_text(folder / CARD, f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def metadata(report: Report, compiled: Compiled, folder: Path) -> ModelCardData:
    """The fields that a model hub reads. The licence is the dense model's, if its own card says one."""
    said = licence.stated(compiled.prepared.loaded.path)
    if "license" not in said and report.model in ALIASES:
        said |= licence.as_fields(ALIASES[report.model].licence)
    tags = ["pruned", "structured-pruning", "mptk"]
    if onnx_graphs(folder):
        tags.append("onnx")
    sentences = (folder / "modules.json").is_file()
    known: dict[str, object] = {"library_name": "sentence-transformers" if sentences else "transformers"}
    if compiled.written is None:
        known = {}
    elif tag := "sentence-similarity" if sentences else pipeline_tag(compiled):
        known["pipeline_tag"] = tag
    if is_hub_id(report.model):
        known |= {"base_model": report.model, "base_model_relation": "finetune"}
    return ModelCardData(**known, **said, tags=tags)  # type: ignore[arg-type]


def pipeline_tag(compiled: Compiled) -> str | None:
    """The hub's name for what the written class does; None if transformers knows none."""
    assert compiled.written is not None
    stock = compiled.written.stock
    known: Mapping[str, Any] = TASK_MAPPING
    for tag, names in known.items():
        if stock.model_class.__name__ in flattened(names):
            return tag
    if auto_of(stock) == "AutoModel":
        return FEATURES.get(stock.model_class.main_input_name, "feature-extraction")
    return None


def is_hub_id(model: str) -> bool:
    """Whether ``model``, the name in a report, is one of the hub: OWNER/NAME, and no path."""
    return _HUB_ID.fullmatch(model) is not None


def base_name(model: str) -> str:
    """The name of the dense model without the folders of this machine that it lies in."""
    return model if is_hub_id(model) else Path(model).name


def title(report: Report) -> str:
    """What it is, in a few sentences."""
    base = code(base_name(report.model))
    s = report.settings
    chosen = "by a plan that was given" if s.plan else f"by the method {code(s.method)}"
    chosen = "" if s.fixed and not s.plan else f"; the units were chosen {chosen}"
    trained = f"; {s.steps} training steps" if s.steps else ""
    return (
        f"# {base}, pruned by {report.sparsity:.0%}\n\n"
        f"This is {base} with {report.sparsity:.1%} of the parameters of its blocks removed by structured pruning: "
        "whole units are gone, so what is left is a smaller model of an ordinary class without masks. "
        f"mptk {report.mptk} made it{chosen}{trained}."
    )


def cut(report: Report) -> str:
    """Widths and sizes, dense beside pruned."""
    widths = table(
        ["units", "dense", "pruned", "layers"],
        [[code(n), f"{f['of']:,}", f"{f['width']:,}", f"{f['layers']:,}"] for n, f in report.families.items()],
    )
    dense, small = report.cost["dense"], report.cost["pruned"]
    tokens, heads = report.vocabulary, report.kv_heads
    rows = [
        *([["tokens in the vocabulary", f"{tokens['of']:,}", f"{tokens['kept']:,}"]] if tokens else []),
        *([["KV heads of a layer, all query heads kept", str(heads["of"]), str(heads["kept"])]] if heads else []),
        ["parameters", f"{dense['parameters']:,.0f}", f"{small['parameters']:,.0f}"],
        ["of these in blocks", f"{dense['block']:,.0f}", f"{small['block']:,.0f}"],
        ["operations a token, in products with weights", f"{dense['flops']:,.0f}", f"{small['flops']:,.0f}"],
        ["bytes of the weights", f"{dense['bytes']:,.0f}", f"{small['bytes']:,.0f}"],
    ]
    return f"## What was cut\n\n{widths}\n\n{table(['', 'dense', 'pruned'], rows)}"


def quality(report: Report) -> str:
    """The metric with its protocol; a word that it is missing if it is."""
    found = report.quality
    if not found:
        return "## Quality\n\nNot measured."
    rows = [[name, f"{found[name]:,}"] for name in ("dense", "pruned") if name in found]
    for scheme, row in report.quantized.items():
        if "quality" in row:
            rows.append([f"{code(row['file'])} ({scheme})", f"{row['quality']:,}"])
    head = table(["", str(code(found.get("metric", "")))], rows)
    return f"## Quality\n\n{head}\n\nMeasured on {code(found.get('protocol', ''))}."


def proof(report: Report) -> str:
    """The stages of the proof and how far each was from the masked dense model."""
    rows = [
        [code(d["stage"]), f"{d['relative']:.1e}", f"{d['tolerance']:.1e}", "yes" if d["ok"] else "no"]
        for d in report.proof
    ]
    return (
        "## Proof\n\n"
        "Each stage was compared with the dense model whose removed units are masked, on sequences of up to "
        f"{report.proof_length:,} tokens or positions. A difference is relative to the largest output. "
        "`mptk verify DIR` repeats it from the dense model.\n\n"
        + table(["stage", "difference", "tolerance", "within"], rows)
    )


def notes(report: Report) -> str:
    """What else a reader must know."""
    lines = "\n".join(_lines(report))
    return f"## Notes\n\n{lines}"


def _lines(report: Report) -> Iterator[str]:
    yield from (f"- {code(note)}" for note in report.notes)
    yield "- Pruning changes what a model says; test it on your own task before you rely on it."
    yield (
        "- `report.json` has all figures, `plan.json` the units that stayed, `run.yaml` the run as a recipe, and "
        "`mptk.json` the SHA-256 of every file."
    )
