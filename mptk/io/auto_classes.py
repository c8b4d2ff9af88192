"""auto_classes: which of transformers' classes a config is for."""

from __future__ import annotations

import functools

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.compat.transformers import model_classes
from mptk.errors import MptkError

# If the classes of several tasks take a config, the first of these wins, unless the checkpoint names another.
_FIRST_TASKS = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")


def auto_class(config: PreTrainedConfig) -> str:
    """Name of the auto class for ``config``: the first with the checkpoint's class, else the first that takes it."""
    code: dict[str, str] = getattr(config, "auto_map", None) or {}
    fitting = {name: _class_names(name, config, code) for name in _auto_names()}
    taken = [name for name, classes in fitting.items() if classes]
    if not taken:
        raise MptkError(f"transformers has no model class for {type(config).__name__}; trust its own code or update")
    saved = set(config.architectures or ())
    return next((name for name in taken if fitting[name] & saved), taken[0])


def classes_of(config: PreTrainedConfig) -> set[type[PreTrainedModel]]:
    """The classes that transformers has for ``config``; empty if the model brings its own."""
    auto = auto_class(config)
    if auto in (getattr(config, "auto_map", None) or {}):
        return set()
    return set(model_classes(auto, config))


@functools.cache
def _auto_names() -> list[str]:
    names = {name for name in dir(transformers) if name.startswith("AutoModelFor")}
    return [*_FIRST_TASKS, *sorted(names.difference(_FIRST_TASKS)), "AutoModel"]


def _class_names(auto: str, config: PreTrainedConfig, code: dict[str, str]) -> set[str]:
    """Names of the classes that the auto class has for ``config``: transformers' and the model's own."""
    names = {known.__name__ for known in model_classes(auto, config)}
    return names | {code[auto].rsplit(".", 1)[-1]} if auto in code else names
