"""runtimes: what programs that run ONNX graphs must be told in a folder.

``genai_config.json``: with it onnxruntime-genai loads the folder and runs its decoder. ``transformers.js_config`` in
``config.json``: where transformers.js finds weights, and in which type.
"""

from __future__ import annotations

import json
from pathlib import Path

import onnx
from onnx import TensorProto
from transformers import GenerationConfig, PreTrainedConfig

from mptk.compat.transformers import find_config_field
from mptk.errors import ProofError
from mptk.files import format_json, write_text
from mptk.reading import Json
from passes.targets.onnx.names import CACHE, name_data_file, name_quantized_file, read_scheme

GENAI_FILE = "genai_config.json"
TYPE = "decoder"
"""onnxruntime-genai's type of a decoder whose inputs and outputs the file names, whatever its architecture."""
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "repetition_penalty", "do_sample")
"""Fields of a generation config that onnxruntime-genai also has."""
KEY, VALUE = "key", "value"


def write_genai_config(config: PreTrainedConfig, generation: GenerationConfig | None, folder: Path, graph: str) -> None:
    """Write ``genai_config.json`` into ``folder``, for the decoder ``graph``, a path in it.

    Nothing is written if onnxruntime-genai cannot run it: it wants the same heads and head size in all layers.
    """
    file = onnx.load(folder / graph, load_external_data=False)
    shapes = {value.name: _shape(value) for value in (*file.graph.input, *file.graph.output)}
    # What the graph has, not what the config says: blocks and heads may have been cut.
    past = [shape for name, shape in shapes.items() if name.startswith("past_key_values.")]
    config = config.get_text_config()
    query_heads = find_config_field(config, "num_attention_heads")
    if any(shape != past[0] for shape in past) or isinstance(query_heads, list):
        return
    _, heads, _, size = past[0]
    decoder: Json = {
        "session_options": {"provider_options": []},
        "filename": graph,
        "head_size": size,
        "hidden_size": getattr(config, "hidden_size", None),
        "num_attention_heads": query_heads or heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": len(past) // 2,
        "inputs": {
            **{name: name for name in ("input_ids", "attention_mask", "position_ids") if name in shapes},
            **{f"past_{part}_names": f"past_key_values.%d.{part}" for part in (KEY, VALUE)},
        },
        "outputs": {"logits": "logits", **{f"present_{part}_names": f"present.%d.{part}" for part in (KEY, VALUE)}},
    }

    # onnxruntime-genai must not share one buffer for past and present: the graph gives a new cache.
    length = _find_context_length(config)
    content = {
        "model": {
            "type": TYPE,
            **_find_special_tokens(config, generation),
            "context_length": length,
            "vocab_size": shapes["logits"][-1],
            "decoder": decoder,
        },
        "search": {**_list_sampling(generation), "max_length": length, "past_present_share_buffer": False},
    }
    write_text(folder / GENAI_FILE, format_json(content, indent=2) + "\n")


def _shape(value: onnx.ValueInfoProto) -> list[int | str]:
    sizes = value.type.tensor_type.shape.dim
    return [size.dim_value if size.HasField("dim_value") else size.dim_param for size in sizes]


def _find_context_length(config: PreTrainedConfig) -> int:
    """Positions that the model has; 2048 if its config bounds none."""
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) else 2048


def _find_special_tokens(config: PreTrainedConfig, generation: GenerationConfig | None) -> Json:
    """The special tokens. A model that never ends a text still needs an id there; none is -1."""

    def find_id(name: str) -> int | list[int] | None:
        return next((i for holder in (generation, config) if (i := getattr(holder, name, None)) is not None), None)

    begin, end, pad = (find_id(f"{kind}_token_id") for kind in ("bos", "eos", "pad"))
    end = -1 if end is None else end
    first = end[0] if isinstance(end, list) else end
    found = {} if begin is None else {"bos_token_id": begin}
    return {**found, "eos_token_id": end, "pad_token_id": max(0, first) if pad is None else pad}


def _list_sampling(config: GenerationConfig | None) -> Json:
    found = {name: getattr(config, name, None) for name in SAMPLING_FIELDS}
    return {name: value for name, value in found.items() if value is not None}


# ---- transformers.js ----

CONFIG_KEY = "transformers.js_config"
HALVES = {"": "fp32", "fp16": "fp16"}
"""Scheme of a graph whose cache may be float16 → what transformers.js calls its ``dtype``."""


def build_js_config(graphs: Path) -> Json:
    """The entry that is true of a folder of graphs; empty if none has its weights where transformers.js looks.

    ``use_external_data_format``: each graph has its weights in a file beside it. ``dtype``: what to take unless the
    program says otherwise, if a float graph has no int8 graph, which browsers take by themselves. ``kv_cache_dtype``:
    dtype → the type of its cache, for releases before 4, which assume float32.
    """
    # transformers.js looks for the weights beside a graph only if it is told that there are some.
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
        raise ProofError(f"{file} is no ONNX graph; export the model again", name=file.name) from error
    return any(v.name.startswith(CACHE) and v.type.tensor_type.elem_type == TensorProto.FLOAT16 for v in inputs)


def write_entry(folder: Path, graphs: str) -> None:
    """Put the entry into ``config.json`` of ``folder``, for the graphs in its subfolder ``graphs``."""
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8")) | {CONFIG_KEY: build_js_config(folder / graphs)}
    write_text(file, format_json(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
