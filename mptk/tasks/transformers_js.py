"""transformers_js: ``transformers.js_config`` in config.json, what transformers.js must know of ONNX graphs."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
from onnx import TensorProto

from mptk.errors import ProofError
from mptk.files import json_text, write_text
from mptk.reading import Json
from passes.targets.onnx.names import CACHE, data_file, quantized, scheme_of

CONFIG_KEY = "transformers.js_config"
HALVES = {"": "fp32", "fp16": "fp16"}
"""Scheme of a graph whose cache may be float16 → what transformers.js calls its ``dtype``."""


def entry(graphs: Path) -> Json:
    """The entry that is true of a folder of graphs; empty if none has its weights where transformers.js looks.

    ``use_external_data_format``: each graph has its weights in a file beside it. ``dtype``: what to take unless the
    program says otherwise, if a float graph has no int8 graph, which browsers take by themselves. ``kv_cache_dtype``:
    dtype → the type of its cache, for releases before 4, which assume float32.
    """
    files = [file for file in sorted(graphs.glob("*.onnx")) if file.with_name(data_file(file.name)).is_file()]
    if not files:
        return {}
    schemes = {file: scheme_of(file) for file in files}
    half = (scheme for file, scheme in schemes.items() if scheme in HALVES and has_half_cache(file))
    caches = {HALVES[scheme]: "float16" for scheme in half}
    return {
        "use_external_data_format": True,
        **({} if all(quantized(file, "int8") in schemes for file in files if not schemes[file]) else {"dtype": "fp32"}),
        **({"kv_cache_dtype": caches} if caches else {}),
    }


def has_half_cache(file: Path) -> bool:
    """Whether a graph takes a KV cache in float16. Raises ProofError if the file is not a graph."""
    try:
        inputs = onnx.load(file, load_external_data=False).graph.input
    except Exception as error:  # protobuf's, which onnx does not name
        raise ProofError(f"{file} is no ONNX graph; export the model again") from error
    return any(v.name.startswith(CACHE) and v.type.tensor_type.elem_type == TensorProto.FLOAT16 for v in inputs)


def write_entry(folder: Path, graphs: str) -> None:
    """Put the entry into ``config.json`` of ``folder``, for the graphs in its subfolder ``graphs``."""
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8")) | {CONFIG_KEY: entry(folder / graphs)}
    write_text(file, json_text(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
