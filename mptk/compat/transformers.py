"""transformers: the classes behind its auto classes, GGUF options, missing config attributes, weights on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import transformers
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel, core_model_loading, modeling_utils


def model_classes(auto: str, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """The classes that an auto class (``AutoModelForCausalLM``) has for ``config``; empty if it does not take it.

    transformers has no public way to get the class from an auto class without building a model. The look-up imports
    the module of the class.
    """
    found = getattr(transformers, auto)._model_mapping.get(type(config), ())
    return found if isinstance(found, tuple) else (found,)


def forget_source(config: PreTrainedConfig) -> None:
    """Remove the title that a config gets from a GGUF file's metadata. It would be saved as the model's path.

    The attribute has no public name, and no option turns it off.
    """
    vars(config).pop("_model_name_or_path", None)


def dequantize_gguf() -> dict[str, object]:
    """Options that make ``from_pretrained`` read a GGUF file into plain floats.

    Releases that can compute on GGUF blocks keep them by default. Earlier ones lack the class.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextlib.contextmanager
def missing_attributes(found: Callable[[PreTrainedConfig, str], None]) -> Iterator[None]:
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
    with _replaced(transformers.GenerationConfig, "from_model_config", lambda *_: transformers.GenerationConfig()):
        yield


@contextlib.contextmanager
def unread_weights() -> Iterator[None]:
    """Within it ``from_pretrained`` reads no weight that stays where it is on disk, and gives back the pages of others.

    It would read all of them and drop them again, with every file mapped meanwhile. Weights that are converted, and
    buffers, are still read, each through a mapping of its own. A loader that skips what it offloads would replace this.
    """
    renaming = core_model_loading.WeightRenaming
    read = renaming.materialize_tensors

    def later(self: Any) -> dict[str, Any]:
        if not all(callable(job) for jobs in self.collected_tensors.values() for job in jobs):
            return read(self)
        return {key: [_Later(job) for job in self.collected_tensors.pop(key)] for key in list(self.collected_tensors)}

    with contextlib.ExitStack() as patches:
        patches.enter_context(_replaced(renaming, "materialize_tensors", later))
        for name in ("offload_weight", "set_param_for_module"):
            whole = _given(getattr(core_model_loading, name))
            patches.enter_context(_replaced(core_model_loading, name, whole))
        patches.enter_context(_replaced(modeling_utils, "safe_open", _Opened))
        yield


@contextlib.contextmanager
def saved_by(split: Callable[..., Any], save: Callable[..., None]) -> Iterator[None]:
    """Within it ``save_pretrained`` has weights divided into files by ``split``, and each file written by ``save``.

    They take what the functions of huggingface_hub and safetensors take, which want the numbers of a whole file at
    once. Arguments would replace this.
    """
    divided = _replaced(modeling_utils, "split_torch_state_dict_into_shards", split)
    with divided, _replaced(modeling_utils, "safe_save_file", save):
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:  # it was inherited
            delattr(owner, name)
        else:
            setattr(owner, name, before)


class _Later:
    """A weight that is read if something needs it after all."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self.read = read


def _given(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` with its weight read first."""
    return lambda *args, **options: call(*(a.read() if isinstance(a, _Later) else a for a in args), **options)


class _Opened:
    """An open safetensors file whose slices open it for themselves: their pages go when they do."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._open: Callable[[], Any] = partial(safe_open, *args, **options)
        self._file: Any = self._open()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        return self._file.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def get_slice(self, key: str) -> _Slice:
        return _Slice(self._open, self._file.get_slice(key), key)


class _Slice:
    def __init__(self, opened: Callable[[], Any], part: Any, key: str) -> None:
        self._open, self._part, self._key = opened, part, key

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def __getitem__(self, index: Any) -> Any:
        with self._open() as file:
            return file.get_slice(self._key)[index]
