"""genai: ``genai_config.json``, with which onnxruntime-genai loads a folder and runs its ONNX decoder."""

from __future__ import annotations

from pathlib import Path

import onnx
from transformers import GenerationConfig, PreTrainedConfig

from mptk.compat.transformers import find_config_field
from mptk.files import format_json, write_text
from mptk.reading import Json

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

    def said(name: str) -> int | list[int] | None:
        return next((i for holder in (generation, config) if (i := getattr(holder, name, None)) is not None), None)

    begin, end, pad = (said(f"{kind}_token_id") for kind in ("bos", "eos", "pad"))
    end = -1 if end is None else end
    first = end[0] if isinstance(end, list) else end
    found = {} if begin is None else {"bos_token_id": begin}
    return {**found, "eos_token_id": end, "pad_token_id": max(0, first) if pad is None else pad}


def _list_sampling(config: GenerationConfig | None) -> Json:
    found = {name: getattr(config, name, None) for name in SAMPLING_FIELDS}
    return {name: value for name, value in found.items() if value is not None}
