"""untrusted: what is checked of a model's folder before any library reads it.

Files stay in their folder, are ordinary files of a bounded size, and are what their names say. The libraries then read
them; their errors become MptkErrors where they are called (``io/models.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from mptk.compat.transformers import find_config_field
from mptk.errors import ModelError, MptkError, take_first_line
from mptk.io.loaders import CONFIG
from mptk.publish.manifest import check_whole
from mptk.reading import Damaged, Json, check_inside, check_regular, make_damage_error, read_json_object, shorten_text

GENERATION = "generation_config.json"
ADAPTER = "adapter_config.json"
# The field of a config that says how its weights are quantised.
QUANTIZATION = "quantization_config"
# transformers' names for sizes that every config of text has.
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    "max_position_embeddings",
)
# Fields that transformers may take for the name of a hub's repository with native code, which it fetches and runs. They
# are refused even if the caller trusts the model's Python code.
KERNELS = tuple(f"{start}{what}_implementation" for start in ("", "_") for what in ("attn", "experts"))
# No size in a config is as large. A larger one could fill the memory before any weight is read.
LARGEST_SIZE = 1 << 31
# More layers than any model has. Building them takes long, even without weights.
MOST_LAYERS = 10_000
# Layers may share weights (ALBERT), so a model may have more layers than weights: up to this many.
SHARED = 256
# More parameters than any model has.
PARAMETERS = 10**14
# Bytes of the largest JSON file in a folder: a tokenizer.
MOST_JSON = 1 << 28
# Bytes of the largest config.json. It is copied again and again; with the names of 21,000 classes it has 1.5 MB.
MOST_CONFIG = 4 << 20


def check_folder(folder: Path) -> None:
    """Check a checkpoint folder.

    Raises:
        MptkError: a file leads out of it, is damaged or is not an ordinary file; there is an adapter beside the model;
            or the folder is a part of another.
    """
    # Where the files lead comes first: nothing outside of the folder is opened.
    check_inside(folder)
    check_whole(folder)
    for file in sorted(folder.glob("*.json")):
        check_regular(file, MOST_JSON)
    if (folder / ADAPTER).exists():
        raise ModelError(
            f"{folder} has an {ADAPTER}: whether an adapter is part of the model is not clear; merge it (peft's "
            "merge_and_unload) and save that, or move the adapter's files elsewhere",
            name=folder,
        )
    content = check_config_file(folder / CONFIG)
    if (folder / GENERATION).exists():
        read_object(folder / GENERATION)
    # The number of layers must fit the files: a class builds all of its layers before it misses a weight.
    weights = sum(check_weights(file) for file in sorted(folder.glob("*.safetensors")))
    for name, value in _list_numbers(content, ""):
        if _is_layer_count(name, value) and weights and value > max(weights, SHARED):
            raise make_damage_error(folder / CONFIG)(f"{name} is {value}, and there are {weights} weights")


def check_config_file(file: Path) -> Json:
    """The content of a config.json. Raises MptkError if it is not a config, or has sizes that no model has."""
    check_regular(file, MOST_CONFIG)
    content = read_object(file)
    classes = content.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(each, str) for each in classes)):
        raise make_damage_error(file)("architectures is not a list of class names")
    for name in ("dtype", "torch_dtype"):
        said = content.get(name)
        if said not in (None, "auto") and not isinstance(
            getattr(torch, str(said).removeprefix("torch."), 0), torch.dtype
        ):
            raise make_damage_error(file)(f"{name} is {shorten_text(repr(said))}, which is not a number type")
    _check_kernels(content, file)
    # Any name, at any depth: classes have their own names for sizes.
    for name, value in _list_numbers(content, ""):
        if abs(value) >= LARGEST_SIZE and isinstance(value, int):
            raise make_damage_error(file)(f"{name} is {value if abs(value) < 10**20 else 'a number of many digits'}")
        if value > MOST_LAYERS and _is_layer_count(name, value):
            raise make_damage_error(file)(f"{name} is {value}")
    return content


def _is_layer_count(name: str, value: float) -> bool:
    """Whether a field may count layers. ``layer_rope_theta`` is no count, and is written as 10000.0."""
    return isinstance(value, int) and "layer" in name.rpartition(".")[2]


def _check_kernels(content: object, file: Path) -> None:
    """Raise MptkError if a config, or a config in it, names a kernel of a hub: native code that would be fetched."""
    if not isinstance(content, dict):
        return
    for name, value in content.items():
        for kernel in value.values() if isinstance(value, dict) else [value]:
            if name in KERNELS and isinstance(kernel, str) and "/" in kernel:
                raise make_damage_error(file, f"remove {name}")(
                    f"{name} asks for native code of a hub, {shorten_text(repr(kernel))}"
                )
        _check_kernels(value, file)


def read_object(file: Path) -> Json:
    """The content of a JSON file of a model. Raises MptkError if it is not an object."""
    return read_json_object(file, make_damage_error(file))


def is_quantized(folder: Path) -> bool:
    """Whether the config of a checkpoint says that its weights are quantised."""
    return read_object(folder / CONFIG).get(QUANTIZATION) is not None


def check_sizes(model: str, config: PreTrainedConfig) -> None:
    """Raise MptkError if a size of a config is below 1."""
    text = config.get_text_config()
    for name in SIZES:
        # A property is not the file's: XLNet's class has -1 for a length without bound.
        value = None if isinstance(getattr(type(text), name, None), property) else find_config_field(text, name)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int | float) and each < 1:
                raise ModelError(f"{name} of {model} is {each}, and must be 1 or more; mend its config.json", name=name)


def check_weights(file: Path) -> int:
    """How many weights a safetensors file has. None of them is read.

    Raises:
        MptkError: its header is not one, or does not fit the file.
    """
    check_regular(file)
    try:
        with safe_open(file, "pt") as opened:
            return len(opened.keys())
    except (SafetensorError, OSError) as error:
        raise make_damage_error(file)(take_first_line(error)) from error


def load_tensors(file: Path, damaged: Damaged) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ``damaged`` if it is missing or is not one."""
    return dict(stream_tensors(file, damaged))


def stream_tensors(file: Path, damaged: Damaged) -> Iterator[tuple[str, Tensor]]:
    """As ``load_tensors``, one by one, so that a file may be larger than memory."""
    try:
        check_regular(file)
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is not a mapping
                yield name, opened.get_tensor(name)
    except (SafetensorError, OSError, MptkError) as error:
        raise damaged(take_first_line(error)) from error


def read_metadata(file: Path, damaged: Damaged) -> Mapping[str, str]:
    """The metadata of a safetensors file. Raises as ``load_tensors``."""
    try:
        check_regular(file)
        with safe_open(file, "pt") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError, MptkError) as error:
        raise damaged(take_first_line(error)) from error


def _list_numbers(content: object, name: str) -> list[tuple[str, float]]:
    """Every number of a JSON value, each with the names that lead to it: ``text_config.hidden_size``."""
    if isinstance(content, dict):
        return [found for key, value in content.items() for found in _list_numbers(value, f"{name}.{key}".lstrip("."))]
    if isinstance(content, list):
        return [found for value in content for found in _list_numbers(value, name)]
    return [(name, content)] if isinstance(content, int | float) and not isinstance(content, bool) else []
