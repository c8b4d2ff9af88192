"""card_usage: how to load a pruned folder, as the commands and the lines of Python that its card shows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from mptk.io.auto_classes import loader
from mptk.protocols.chain import Compiled
from mptk.protocols.report import Report
from mptk.report.markdown import body
from mptk.report.view import Name, Table, megabytes
from mptk.tasks.genai import GENAI_FILE as GENAI_CONFIG
from passes.targets.stock.config import StockConfig

TEXT = "Once upon a time"
FOLDER = 'folder = "."  # this folder, or its name on a hub'


def usage(report: Report, compiled: Compiled, folder: Path) -> Iterator[str]:
    """The sections of the card that say how to use ``folder``, each for a program that can."""
    if compiled.written is not None:
        yield section("transformers", python(*transformers_lines(compiled, folder)))
        if (folder / "modules.json").is_file():
            yield section("sentence-transformers", python(*SENTENCES))
        if report.task == "causal-lm":
            yield section("llama.cpp", f"If llama.cpp knows the architecture:\n\n{shell(*LLAMA_CPP)}")
    if graphs := onnx_graphs(folder):
        yield onnx(report, folder, graphs)


def section(name: str, body: str) -> str:
    """A section on one program."""
    return f"## In {name}\n\n{body}"


def python(*lines: str) -> str:
    """Lines of Python as a block."""
    return "\n".join(("```python", *lines, "```"))


def shell(*lines: str) -> str:
    """Commands as a block."""
    return "\n".join(("```bash", *lines, "```"))


SENTENCES = (
    "from sentence_transformers import SentenceTransformer",
    "",
    FOLDER,
    f'print(SentenceTransformer(folder).encode(["{TEXT}"]))',
)
LLAMA_CPP = (
    "python convert_hf_to_gguf.py DIR --outfile model.gguf --outtype q8_0",
    f'llama-cli -m model.gguf -p "{TEXT}"',
)
GENAI_LINES = (
    "import onnxruntime_genai as og",
    "",
    'model = og.Model(".")  # this folder',
    "tokenizer = og.Tokenizer(model)",
    "params = og.GeneratorParams(model)",
    "params.set_search_options(max_length=40)",
    "generator = og.Generator(model, params)",
    f'generator.append_tokens(tokenizer.encode("{TEXT}"))',
    "while not generator.is_done():",
    "    generator.generate_next_token()",
    "print(tokenizer.decode(generator.get_sequence(0)))",
)


def auto_of(stock: StockConfig) -> str:
    """Name of the auto class that loads a written checkpoint, or of its class if no auto class knows it."""
    name = stock.model_class.__name__
    if name in flattened(MODEL_MAPPING_NAMES):
        return "AutoModel"
    config = copy.copy(stock.config)
    config.architectures = [name]
    return loader(config)


def flattened(names: Mapping[str, Any]) -> set[str]:
    """The names of classes in one of transformers' mappings, which has one or several for each model type."""
    return {name for known in names.values() for name in ([known] if isinstance(known, str) else known)}


def transformers_lines(compiled: Compiled, folder: Path) -> Iterator[str]:
    """Load model and tokenizer or processor, and run them if the input is text."""
    assert compiled.written is not None
    stock, auto = compiled.written.stock, auto_of(compiled.written.stock)
    trust = ", trust_remote_code=True" if compiled.prepared.loaded.trusted and any(folder.glob("*.py")) else ""
    text = (folder / "tokenizer_config.json").is_file()
    other = any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    prepare = "AutoProcessor" if other else "AutoTokenizer" if text else None
    yield f"from transformers import {', '.join(sorted(name for name in (auto, prepare) if name))}"
    yield ""
    yield FOLDER
    yield f"model = {auto}.from_pretrained(folder{trust})"
    if prepare is None:
        return
    name = "processor" if other else "tokenizer"
    yield f"{name} = {prepare}.from_pretrained(folder{trust})"
    if other:
        return
    yield f'inputs = tokenizer("{TEXT}", return_tensors="pt")'
    if stock.model_class.can_generate():
        yield "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"
    else:
        yield "print(model(**inputs))"


def onnx_graphs(folder: Path) -> list[Path]:
    """The ONNX files of a pruned folder."""
    return sorted((folder / "onnx").glob("*.onnx"))


def onnx(report: Report, folder: Path, graphs: list[Path]) -> str:
    """The ONNX graphs with their sizes, and the programs that run them."""
    schemes = {row["file"]: scheme for scheme, row in report.quantized.items()}
    names = [file.relative_to(folder).as_posix() for file in graphs]
    sizes = [sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")) for file in graphs]
    rows = [[Name(name), schemes.get(name, "float"), megabytes(size)] for name, size in zip(names, sizes, strict=True)]
    lines = [
        "import onnxruntime",
        "",
        f'session = onnxruntime.InferenceSession("{names[0]}")',
        "print([(value.name, value.shape) for value in session.get_inputs()])",
    ]
    parts = [body([Table("llr", ["graph", "weights", "size"], rows)]), python(*lines)]
    if (folder / GENAI_CONFIG).is_file():
        parts.append(f"Text, with the package onnxruntime-genai:\n\n{python(*GENAI_LINES)}")
    return section("ONNX Runtime", "\n\n".join(parts))
