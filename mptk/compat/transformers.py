"""transformers: the classes behind its auto classes, GGUF options, missing config attributes, fields of unlike layers,
weights on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, modeling_layers, modeling_utils


def find_auto_classes(auto: str, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """The classes that an auto class (``AutoModelForCausalLM``) has for ``config``; empty if it does not take it.

    transformers has no public way to get the class from an auto class without building a model. The look-up imports
    the module of the class.
    """
    found = getattr(transformers, auto)._model_mapping.get(type(config), ())
    return found if isinstance(found, tuple) else (found,)


def list_ignored_weights(model: PreTrainedModel) -> frozenset[str]:
    """Patterns of the names in a checkpoint that ``from_pretrained`` leaves out without a word.

    ``MtpModel`` takes the names of multi-token-prediction layers from them, too. The attribute has no public name.
    """
    return frozenset(model._keys_to_ignore_on_load_unexpected or ())


def forget_source(config: PreTrainedConfig) -> None:
    """Remove the title that a config gets from a GGUF file's metadata. It would be saved as the model's path.

    The attribute has no public name, and no option turns it off.
    """
    vars(config).pop("_model_name_or_path", None)


def read_gguf_config(gguf: Path) -> PreTrainedConfig:
    """The config in a GGUF file's metadata, without the model's title and with rounded numbers.

    GGUF stores float32: an epsilon of 1e-05 is read as 9.999999747378752e-06, and rounded to 1e-05 here.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    forget_source(config)
    for name, value in vars(config).items():
        if isinstance(value, float):
            setattr(config, name, float(str(np.float32(value))))
    return config


def dequantize_gguf() -> dict[str, object]:
    """Options that make ``from_pretrained`` read a GGUF file into plain floats.

    Releases that can compute on GGUF blocks keep them by default. Earlier ones lack the class.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def compute_vision_inputs(encoder: nn.Module, grids: Tensor) -> dict[str, Any]:
    """What a vision encoder computes of ``grids``, int64 [images, 3], with loops: the argument's name → its value.

    It is of transformers' own exporter, and takes time to import.
    """
    from transformers.exporters.utils import precompute_export_inputs

    inputs: dict[str, object] = {"grid_thw": grids}
    precompute_export_inputs(encoder, inputs)
    return {name: value for name, value in inputs.items() if name != "grid_thw"}


@contextlib.contextmanager
def watch_missing_attributes(found: Callable[[PreTrainedConfig, str], None]) -> Iterator[None]:
    """Within it, each read of an attribute that a config lacks calls ``found(config, name)``.

    It patches the base class and not one object, since models copy their config and look up its exact type. It may be
    nested: each level is called for each miss. Afterwards the class is restored. A hook for reads would replace this.
    """
    before = vars(PreTrainedConfig).get("__getattr__")

    def absent(self: PreTrainedConfig, name: str) -> object:
        found(self, name)
        if before is not None:
            return before(self, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    setattr(PreTrainedConfig, "__getattr__", absent)  # noqa: B010 (mypy: the class declares no __getattr__)
    try:
        yield
    finally:
        if before is None:
            delattr(PreTrainedConfig, "__getattr__")
        else:
            setattr(PreTrainedConfig, "__getattr__", before)  # noqa: B010


@contextlib.contextmanager
def without_generation() -> Iterator[None]:
    """Within it a model is made with the default settings of generation, which are else read from its config as JSON.

    An argument would replace this.
    """
    with _replace_attribute(
        transformers.GenerationConfig, "from_model_config", lambda *_: transformers.GenerationConfig()
    ):
        yield


@contextlib.contextmanager
def replace_opener(opened: Callable[..., object]) -> Iterator[None]:
    """Within it ``from_pretrained`` opens safetensors files with ``opened``, in place of ``safe_open``.

    It would read all weights. An argument would replace this.
    """
    with (
        _replace_attribute(modeling_utils, "safe_open", opened),
        _replace_attribute(modeling_layers, "safe_open", opened),
    ):
        yield


@contextlib.contextmanager
def replace_saver(split: Callable[..., object], save: Callable[..., None]) -> Iterator[None]:
    """Within it ``save_pretrained`` has weights divided into files by ``split``, and each file written by ``save``.

    They take what the functions of huggingface_hub and safetensors take, which want the numbers of a whole file at
    once. Arguments would replace this.
    """
    divided = _replace_attribute(modeling_utils, "split_torch_state_dict_into_shards", split)
    with divided, _replace_attribute(modeling_utils, "safe_save_file", save):
        yield


@contextlib.contextmanager
def name_weight_files(file: str) -> Iterator[None]:
    """Within it ``from_pretrained`` and ``save_pretrained`` have weights in ``file``, or in shards named after it.

    An argument would replace this.
    """
    one = _replace_attribute(modeling_utils, "SAFE_WEIGHTS_NAME", file)
    with one, _replace_attribute(modeling_utils, "SAFE_WEIGHTS_INDEX_NAME", f"{file}.index.json"):
        yield


@contextlib.contextmanager
def _replace_attribute(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def find_config_field(config: PreTrainedConfig, name: str) -> object:
    """The value of a field; None if it is missing, a list with one value for each layer if layers may differ.

    transformers raises an error if such a field is read from the config itself.
    """
    held = getattr(config, "attribute_map", {}).get(name, name)
    if held in (getattr(config, "per_layer_attributes", None) or ()):
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return getattr(config, name, None)


ConfigPair = tuple[PreTrainedConfig, PreTrainedConfig]


def match_configs(config: PreTrainedConfig, like: PreTrainedConfig) -> Iterator[ConfigPair]:
    """A config and those within it, each with its counterpart in ``like``."""
    yield config, like
    for name, inner in vars(config).items():
        if isinstance(inner, PreTrainedConfig) and isinstance(other := getattr(like, name, None), PreTrainedConfig):
            yield from match_configs(inner, other)
