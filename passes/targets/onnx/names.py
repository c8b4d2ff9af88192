"""names: the folder and the files of ONNX graphs, as optimum and transformers.js expect them."""

from __future__ import annotations

from pathlib import Path

ONNX_FOLDER = "onnx"
ONNX_FILE = "model.onnx"
CACHE = "past_key_values."
"""Prefix of a KV cache's inputs."""
QUANTIZED = {"int8": "model_quantized.onnx", "int4": "model_q4.onnx", "fp16": "model_fp16.onnx"}
"""Scheme → the file of its graph. transformers.js calls the first ``q8``; browsers take it by themselves."""


def data_file(name: str) -> str:
    """The file with the weights of the graph in file ``name``, beside it."""
    return f"{name}_data"


def quantized_files(folder: Path) -> list[Path]:
    """The quantised graphs beside FILE."""
    return sorted(folder.glob("model_*.onnx"))


def scheme_of(file: Path) -> str:
    """The scheme of a quantised graph, by its file's name. Older folders name the files after the schemes."""
    known = {name: scheme for scheme, name in QUANTIZED.items()}
    return known.get(file.name, file.stem.removeprefix("model_"))
