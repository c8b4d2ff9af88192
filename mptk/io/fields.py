"""fields: reads a config's field, which a config of unlike layers has once a layer."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


def field(config: PreTrainedConfig, name: str) -> Any:
    """The value of a field; None if it is missing, a list with one value for each layer if layers may differ.

    transformers raises an error if such a field is read from the config itself.
    """
    held = getattr(config, "attribute_map", {}).get(name, name)
    if held in (getattr(config, "per_layer_attributes", None) or ()):
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return getattr(config, name, None)
