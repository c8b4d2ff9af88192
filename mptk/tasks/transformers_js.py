"""transformers_js: ``transformers.js_config`` in config.json, what transformers.js must know of ONNX graphs."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
from onnx import TensorProto

from mptk.errors import ProofError
from mptk.files import format_json, write_text
from mptk.reading import Json
from passes.targets.onnx.names import CACHE, name_data_file, name_quantized_file, read_scheme

CONFIG_KEY = "transformers.js_config"
HALVES = {"": "fp32", "fp16": "fp16"}
"""Scheme of a graph whose cache may be float16 → what transformers.js calls its ``dtype``."""


def build_js_config(graphs: Path) -> Json:
    """The entry that is true of a folder of graphs; empty if none has its weights where transformers.js looks.

    ``use_external_data_format``: each graph has its weights in a file beside it. ``dtype``: what to take unless the
    program says otherwise, if a float graph has no int8 graph, which browsers take by themselves. ``kv_cache_dtype``:
    dtype → the type of its cache, for releases before 4, which assume float32.
    """
    files = [file for file in sorted(graphs.glob("*.onnx")) if file.with_name(name_data_file(file.name)).is_file()]
    if not files:
        return {}
    schemes = {file: read_scheme(file) for file in files}
    half = (scheme for file, scheme in schemes.items() if scheme in HALVES and has_half_cache(file))
    caches = {HALVES[scheme]: "float16" for scheme in half}
    return {
        "use_external_data_format": True,
        **(
            {}
            if all(name_quantized_file(file, "int8") in schemes for file in files if not schemes[file])
            else {"dtype": "fp32"}
        ),
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
    content = json.loads(file.read_text(encoding="utf-8")) | {CONFIG_KEY: build_js_config(folder / graphs)}
    write_text(file, format_json(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
