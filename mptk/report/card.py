"""card: ``README.md`` of a pruned folder: the model, the cut, its quality, its proof, how to load it.

``templates/card.md`` has the words. Its first lines are the metadata that the Hugging Face hub reads. Names and words
that come from models or files are in code spans, so that they cannot become markup.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers.modelcard import TASK_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from mptk.files import write_text
from mptk.io import find_named_licence, name_class, name_library, name_whole_class
from mptk.protocols import Compiled, Report
from mptk.publish import licence
from mptk.publish.licence import CARD
from mptk.report.runs import shorten_model_name
from mptk.report.sections import CUT_TITLE, PROOF_TITLE, QUALITY, build_prune_view
from mptk.report.view import Name, Table, View, format_code, format_megabytes, render_markdown, render_parts
from mptk.tasks.runtimes import GENAI_FILE
from passes.targets.stock.config import StockConfig

FEATURE_TASKS = {"pixel_values": "image-feature-extraction"}
"""Main input of a bare encoder → the hub's name of its task; by default feature-extraction."""
# OWNER/NAME, as huggingface_hub allows it.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}/[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)


def write_card(report: Report, compiled: Compiled | None, folder: Path) -> None:
    """Write ``README.md``. ``folder``: with all other files. ``report``: its quality may still be unknown.

    ``compiled``: None for a module's graph whose dense module is not in memory.
    """
    # What is said follows from the files in the folder: a graph that was left out has no section.
    graphs = sorted((folder / "onnx").glob("*.onnx"))
    environment = Environment(  # no autoescape, which is for HTML: names go through the filter ``code``
        loader=PackageLoader("mptk.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = format_code
    said = environment.get_template("card.md").render(
        data=make_metadata(report, compiled, folder).to_yaml(),
        report=report,
        settings=report.settings,
        base=format_code(shorten_model_name(report.model)),
        told=render_results(report),
        graphs=[file.relative_to(folder).as_posix() for file in graphs],
        sizes=render_parts([build_size_table(report, folder, graphs)]),
        genai=(folder / GENAI_FILE).is_file(),
        archive=(folder / "model.pt2").is_file(),
        **describe_loading(compiled, folder),
    )
    write_text(folder / CARD, said)


def make_metadata(report: Report, compiled: Compiled | None, folder: Path) -> ModelCardData:
    """The fields that a model hub reads. The licence is the dense model's, if its card names one."""
    # The licence: of the dense model's card, else of the name that stands for it.
    said = {} if compiled is None else licence.read_licence(compiled.prepared.loaded.path)
    if "license" not in said and (named := find_named_licence(report.model)):
        said |= licence.make_licence_fields(named)
    tags = ["pruned", "structured-pruning", "mptk"]
    if any((folder / "onnx").glob("*.onnx")):
        tags.append("onnx")
    # What loads the folder and what it does. A graph has neither a library nor a task that the hub knows.
    sentences = (folder / "modules.json").is_file()
    known: dict[str, object] = {"library_name": "sentence-transformers" if sentences else name_card_library(compiled)}
    if compiled is None or compiled.written is None:
        known = {}
    elif tag := "sentence-similarity" if sentences else find_pipeline_tag(compiled.written.stock):
        known["pipeline_tag"] = tag
    # A local path would be a broken link, and would tell the world how the user's folders are named.
    if is_hub_id(report.model):
        known |= {"base_model": report.model, "base_model_relation": "finetune"}
    return ModelCardData(**known, **said, tags=tags)  # type: ignore[arg-type]


def find_pipeline_tag(stock: StockConfig) -> str | None:
    """The hub's name for what the written class does; None if transformers knows none."""
    known: Mapping[str, Any] = TASK_MAPPING
    for tag, names in known.items():
        if stock.model_class.__name__ in flatten_names(names):
            return tag
    if name_auto_class(stock) == "AutoModel":
        return FEATURE_TASKS.get(stock.model_class.main_input_name, "feature-extraction")
    return None


def is_hub_id(model: str) -> bool:
    """Whether ``model``, the name in a report, is a hub id (OWNER/NAME), not a path."""
    return _HUB_ID.fullmatch(model) is not None


def render_results(report: Report) -> str:
    """What was cut, how good it is, and how it was proven."""
    shown = (
        section for section in build_prune_view(report).sections if section.title in (CUT_TITLE, QUALITY, PROOF_TITLE)
    )
    return render_markdown(View(list(shown)))


def build_size_table(report: Report, folder: Path, graphs: Sequence[Path]) -> Table:
    """The ONNX graphs with their sizes."""
    schemes = {row["file"]: scheme for scheme, row in report.quantized.items()}
    rows = []
    for file in graphs:
        name = file.relative_to(folder).as_posix()
        # With its external data, files whose names begin with the graph's.
        size = sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))
        rows.append([Name(name), schemes.get(name, "float"), format_megabytes(size)])
    return Table("llr", ["graph", "weights", "size"], rows)


# ---- how a folder is loaded ----


def describe_loading(compiled: Compiled | None, folder: Path) -> dict[str, object]:
    """What loads a folder: a ``library``, its class of the model (``auto``), and its class of what makes inputs."""
    # What makes inputs: a processor, if there is one, includes the tokenizer.
    other = any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    text = (folder / "tokenizer_config.json").is_file()
    trusts = any(folder.glob("*.py"))
    stock = None if compiled is None or compiled.written is None else compiled.written.stock
    return {
        "library": name_card_library(compiled),
        "auto": None if stock is None else name_whole_class(folder) or name_auto_class(stock),
        "generates": stock is not None and stock.model_class.can_generate(),
        "reader": "AutoProcessor" if other else "AutoTokenizer" if text else None,
        "sentences": (folder / "modules.json").is_file(),
        "trust": ", trust_remote_code=True" if trusts else "",
    }


def name_card_library(compiled: Compiled | None) -> str:
    """The library whose class the written checkpoint has, if it has one."""
    written = None if compiled is None else compiled.written
    return "transformers" if written is None else name_library(written.cut)


def name_auto_class(stock: StockConfig) -> str:
    """Name of the auto class that loads a written checkpoint, or of its class if no auto class knows it."""
    # A bare model is in no mapping of heads. For the others transformers itself is asked, by the config as written.
    name = stock.model_class.__name__
    if name in flatten_names(MODEL_MAPPING_NAMES):
        return "AutoModel"
    config = copy.copy(stock.config)
    config.architectures = [name]
    return name_class(config)


def flatten_names(names: Mapping[str, str | Sequence[str]]) -> set[str]:
    """The names of classes in one of transformers' mappings, which has one or several for each model type."""
    return {name for known in names.values() for name in ([known] if isinstance(known, str) else known)}
