"""transformers: what its auto classes map to, and which attributes of a config its models ask for in vain."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import transformers
from transformers import PreTrainedConfig, PreTrainedModel


def model_classes(auto: str, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """The classes that an auto class (``AutoModelForCausalLM``) has for ``config``; none if it does not take it.

    transformers has no public way to ask an auto class for the class without building a model. Looking a class up
    imports its module.
    """
    found = getattr(transformers, auto)._model_mapping.get(type(config), ())
    return found if isinstance(found, tuple) else (found,)


def forget_source(config: PreTrainedConfig) -> None:
    """Remove the title that a GGUF file's metadata give a config: it would be saved as the model's path.

    The attribute has no public name and no option turns it off.
    """
    vars(config).pop("_model_name_or_path", None)


def dequantize_gguf() -> dict[str, object]:
    """Options with which ``from_pretrained`` reads a GGUF file into plain floats.

    Releases that can compute on GGUF blocks keep them unless they are told not to; earlier ones lack the class.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextlib.contextmanager
def missing_attributes(found: Callable[[PreTrainedConfig, str], None]) -> Iterator[None]:
    """Within it, ``found(config, name)`` is called for each attribute that is asked of any config in vain.

    The base class is patched, not one object: models copy their config and look up its exact type. May be nested; each
    level hears of every miss, and the class is as before afterwards. A hook for lookups would replace this.
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
