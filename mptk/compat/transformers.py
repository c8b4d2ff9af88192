"""transformers: the classes behind its auto classes, missing config attributes, fields of unlike layers, weights on
disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_layers, modeling_utils


def find_auto_classes(auto: str, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """The classes that an auto class (``AutoModelForCausalLM``) has for ``config``; empty if it does not take it."""
    # No public way gives the class without building a model. The look-up imports the module of the class.
    found = getattr(transformers, auto)._model_mapping.get(type(config), ())
    return found if isinstance(found, tuple) else (found,)


def list_ignored_weights(model: PreTrainedModel) -> frozenset[str]:
    """Patterns of the names in a checkpoint that ``from_pretrained`` leaves out without a word.

    The names of multi-token-prediction layers are among them. The attribute has no public name.
    """
    return frozenset(model._keys_to_ignore_on_load_unexpected or ())


def forget_source(config: PreTrainedConfig) -> None:
    """Remove the title that a config gets from a GGUF file's metadata. It would be saved as the model's path."""
    # The attribute has no public name, and no option turns it off.
    vars(config).pop("_model_name_or_path", None)


def compute_vision_inputs(encoder: nn.Module, grids: Tensor) -> dict[str, Any]:
    """The arguments that a vision encoder else computes from ``grids``, int64 [images, 3], in loops: name → value."""
    # transformers' own exporter does this. It takes time to import.
    from transformers.exporters.utils import precompute_export_inputs

    inputs: dict[str, object] = {"grid_thw": grids}
    precompute_export_inputs(encoder, inputs)
    return {name: value for name, value in inputs.items() if name != "grid_thw"}


@contextlib.contextmanager
def watch_missing_attributes(found: Callable[[PreTrainedConfig, str], None]) -> Iterator[None]:
    """Call ``found(config, name)`` at each read of an attribute that a config lacks. A hook would replace this.

    It may be nested: each level is called for each miss.
    """
    # The base class is patched and not one object, since models copy their config and look up its exact type.
    before = vars(PreTrainedConfig).get("__getattr__")

    def report_missing(self: PreTrainedConfig, name: str) -> object:
        found(self, name)
        if before is not None:
            return before(self, name)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    setattr(PreTrainedConfig, "__getattr__", report_missing)  # noqa: B010 (mypy: the class declares no __getattr__)
    try:
        yield
    finally:
        if before is None:
            delattr(PreTrainedConfig, "__getattr__")
        else:
            setattr(PreTrainedConfig, "__getattr__", before)  # noqa: B010


@contextlib.contextmanager
def without_generation() -> Iterator[None]:
    """Let models be made with the default settings of generation. An argument would replace this."""
    # transformers else reads them from the model's config as JSON, which cannot hold symbols.
    with _replace_attribute(
        transformers.GenerationConfig, "from_model_config", lambda *_: transformers.GenerationConfig()
    ):
        yield


@contextlib.contextmanager
def replace_opener(opened: Callable[..., object]) -> Iterator[None]:
    """Let ``from_pretrained`` open safetensors files with ``opened``. An argument would replace this."""
    # ``safe_open``, which it else calls, would have all weights read.
    with (
        _replace_attribute(modeling_utils, "safe_open", opened),
        _replace_attribute(modeling_layers, "safe_open", opened),
    ):
        yield


@contextlib.contextmanager
def replace_saver(split: Callable[..., object], save: Callable[..., None]) -> Iterator[None]:
    """Let ``save_pretrained`` divide weights into files by ``split``, and write each file by ``save``.

    They take the arguments of the functions of huggingface_hub and safetensors. Arguments would replace this.
    """
    # Those functions want the numbers of a whole file at once.
    divided = _replace_attribute(modeling_utils, "split_torch_state_dict_into_shards", split)
    with divided, _replace_attribute(modeling_utils, "safe_save_file", save):
        yield


@contextlib.contextmanager
def name_weight_files(file: str) -> Iterator[None]:
    """Let ``from_pretrained`` and ``save_pretrained`` name the weights' file ``file``. An argument would replace this.

    Shards are named after it.
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
    """The value of a field; None if it is missing, a list with one value for each layer if layers may differ."""
    held = getattr(config, "attribute_map", {}).get(name, name)
    # transformers raises an error if such a field is read from the config itself.
    if held in (getattr(config, "per_layer_attributes", None) or ()):
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return getattr(config, name, None)


ConfigPair = tuple[PreTrainedConfig, PreTrainedConfig]


def match_configs(config: PreTrainedConfig, like: PreTrainedConfig) -> Iterator[ConfigPair]:
    """A config and the configs in it, each with its counterpart in ``like``."""
    yield config, like
    for name, inner in vars(config).items():
        if isinstance(inner, PreTrainedConfig) and isinstance(other := getattr(like, name, None), PreTrainedConfig):
            yield from match_configs(inner, other)
