"""card: ``README.md`` of a pruned folder: what it is, what was cut, how good it is, its proof, how to load it.

Its first lines are the metadata of a model hub. Names and words that come from models or files stand in code spans, so
that they cannot become markup.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
from mptk.report.card_usage import auto_of, flattened, onnx_graphs, usage
from mptk.report.markdown import code, rendered
from mptk.report.runs import model_name
from mptk.report.sections import CUT, PROOF, QUALITY, prune_view
from mptk.report.view import View

FEATURES = {"pixel_values": "image-feature-extraction"}
"""Main input of a bare encoder → the hub's name of its task; that of others is feature-extraction."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)


def write_card(report: Report, compiled: Compiled, folder: Path) -> None:
    """Write ``README.md``. ``folder``: with all other files. ``report``: its quality may still be unknown."""
    data = metadata(report, compiled, folder)
    body = "\n\n".join([title(report), told(report), *usage(report, compiled, folder), notes(report)])
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


def title(report: Report) -> str:
    """What it is, in a few sentences."""
    base = code(model_name(report.model))
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


def told(report: Report) -> str:
    """What was cut, how good it is, and how it was proven."""
    shown = (section for section in prune_view(report).sections if section.title in (CUT, QUALITY, PROOF))
    return rendered(View(list(shown)))


def notes(report: Report) -> str:
    """What else a reader must know."""
    lines = [
        *map(code, report.notes),
        "Pruning changes what a model says; test it on your own task before you rely on it.",
        "`report.json` has all figures, `plan.json` the units that stayed, `run.yaml` the run as a recipe, and "
        "`mptk.json` the SHA-256 of every file.",
    ]
    return "\n".join(["## Notes\n", *(f"- {line}" for line in lines)])
