"""auto_classes: which of transformers' classes a config is for."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.compat.transformers import find_auto_classes
from mptk.errors import ModelError
from mptk.io.loaders import PLAIN_CHECKPOINTS, list_loaders

# If the classes of several tasks take a config, the first of these wins, unless the checkpoint names another.
_FIRST_TASKS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")


def name_class(config: PreTrainedConfig) -> str:
    """Name of what in transformers, or in a loader's library, loads a checkpoint with ``config``.

    If no loader has a class for it:

    1. the first auto class with the class that the checkpoint names;
    2. the checkpoint's class itself, if it has a head (``…For…``) and only ``AutoModel`` takes the config;
    3. the first auto class that takes the config;
    4. the checkpoint's class itself.

    Raises:
        MptkError: transformers has no class for it.
    """
    if (own := find_loaders_class(config)) is not None:
        return own.__name__
    code: dict[str, str] = getattr(config, "auto_map", None) or {}
    # Which auto classes take the config, and which of the checkpoint's own classes do.
    fitting = {name: _list_class_names(name, config, code) for name in _list_auto_names()}
    taken = [name for name, classes in fitting.items() if classes]
    saved = set(config.architectures or ())
    named = [found.__name__ for found in map(_find_class, sorted(saved)) if found and _takes(found, config)]
    if taken:
        # ``AutoModel``, the last of all, would leave the head out (2).
        heads = [name for name in named if "For" in name] if taken[0] == "AutoModel" else []
        return next((name for name in taken if fitting[name] & saved), (heads or taken)[0])
    if not named:
        raise ModelError(
            f"transformers has no model class for {type(config).__name__}; trust its own code or update",
            name=type(config).__name__,
        )
    return named[0]  # no auto class knows decoders such as ``MusicgenForCausalLM`` (4)


def find_class(config: PreTrainedConfig) -> Any:
    """The class, or the auto class of transformers, that ``name_class`` names."""
    return find_loaders_class(config) or getattr(transformers, name_class(config))


def find_loaders_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that a loader has for ``config``; None for a config of transformers or of a model's own code."""
    return next(filter(None, (loader.find_class(config) for loader in list_loaders())), None)


def name_library(config: PreTrainedConfig) -> str:
    """The library that has the class for ``config``."""
    owner = next((loader for loader in list_loaders() if loader.find_class(config) is not None), PLAIN_CHECKPOINTS)
    return owner.library


def find_model_classes(config: PreTrainedConfig) -> set[type[PreTrainedModel]]:
    """The classes that transformers or a loader has for ``config``; empty if the model brings its own code."""
    if (own := find_loaders_class(config)) is not None:
        return {own}
    name = name_class(config)
    if (found := _find_class(name)) is not None:
        return {found}
    if name in (getattr(config, "auto_map", None) or {}):
        return set()
    return set(find_auto_classes(name, config))


@functools.cache
def _list_auto_names() -> list[str]:
    names = {name for name in dir(transformers) if name.startswith("AutoModelFor")}
    return [*_FIRST_TASKS, *sorted(names.difference(_FIRST_TASKS)), "AutoModel"]


def _list_class_names(auto: str, config: PreTrainedConfig, code: dict[str, str]) -> set[str]:
    """Names of the classes that an auto class has for ``config``: transformers', and the model's own (``code``)."""
    names = {known.__name__ for known in find_auto_classes(auto, config)}
    return names | {code[auto].rsplit(".", 1)[-1]} if auto in code else names


def _find_class(name: str) -> type[PreTrainedModel] | None:
    """transformers' model of that name; None if it has none, such as for the name of an auto class."""
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _takes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    taken = model_class.config_class
    return taken is not None and isinstance(config, taken)
