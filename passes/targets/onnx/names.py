"""names: of the folder and the files of ONNX graphs, as optimum and transformers.js expect them, and of axes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

ONNX_FOLDER = "onnx"
"""Of a checkpoint: optimum and transformers.js look for graphs there."""
ONNX_FILE = "model.onnx"
CACHE = "past_key_values."
"""Prefix of a KV cache's inputs."""
Axes = tuple[str | None, ...]
"""Names of an input's axes; None: no name."""
ENDINGS = {"int8": "_quantized", "int4": "_q4", "fp16": "_fp16"}
"""Scheme → what its graphs' names end in. transformers.js calls the first ``q8``; browsers take it by themselves."""


def name_data_file(name: str) -> str:
    """The file with the weights of the graph in file ``name``, beside it."""
    return f"{name}_data"


def name_quantized_file(file: Path, scheme: str) -> Path:
    """The file of the scheme's graph beside the float graph in ``file``."""
    return file.with_stem(file.stem + ENDINGS[scheme])


def read_scheme(file: Path) -> str:
    """The scheme of a quantised graph, by its file's name; "" of a float graph."""
    return next((scheme for scheme, ending in ENDINGS.items() if file.stem.endswith(ending)), "")


def name_float_file(file: Path) -> Path:
    """The float graph of a quantised one, beside it."""
    return file.with_stem(file.stem.removesuffix(ENDINGS[read_scheme(file)]))


def list_quantized_files(folder: Path) -> dict[str, list[Path]]:
    """Scheme → its graphs in a folder, for the schemes that have any."""
    files = sorted(folder.glob("*.onnx"))
    found = {scheme: [file for file in files if read_scheme(file) == scheme] for scheme in ENDINGS}
    return {scheme: graphs for scheme, graphs in found.items() if graphs}


def count_graph_bytes(files: Iterable[Path]) -> int:
    """The size of graphs with their weights. A small graph may have no file of weights."""
    parts = (part for file in files for part in (file, file.with_name(name_data_file(file.name))))
    return sum(part.stat().st_size for part in parts if part.is_file())
