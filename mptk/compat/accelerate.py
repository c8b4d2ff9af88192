"""accelerate: its global state, and models whose weights stay on disk."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import PreTrainedModel

_FSDP_LOADS = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""The variable by which accelerate tells transformers that only the first process loads weights."""


@contextlib.contextmanager
def own_state(device: str = "auto") -> Iterator[None]:
    """Within it an Accelerator is made as if it were the first of this process. Afterwards the caller's state is back.

    ``device``: where a single process computes; ``auto``: as accelerate chooses.

    accelerate keeps one precision and one plugin for all Accelerators of a process, and refuses a second. It has no
    public way to set that state aside. The connection between the processes stays.
    """
    outer, meeting = dict(AcceleratorState._shared_state), dict(PartialState._shared_state)
    AcceleratorState._reset_state()
    chosen = {"ACCELERATE_USE_CPU": "1"} if device == "cpu" else {"ACCELERATE_TORCH_DEVICE": device}
    if device == "auto" or os.environ.get("WORLD_SIZE", "1") != "1":
        chosen = {}
    before = {name: os.environ[name] for name in chosen if name in os.environ}
    if chosen:
        PartialState._reset_state()
        os.environ.update(chosen)
    try:
        yield
    finally:
        for name in chosen:
            del os.environ[name]
        os.environ.update(before)
        AcceleratorState._reset_state()
        AcceleratorState._shared_state.update(outer)
        if meeting:  # if not, this run connected the processes
            PartialState._shared_state.update(meeting)


@contextlib.contextmanager
def offloaded(folder: str) -> Iterator[dict[str, object]]:
    """Options that make ``from_pretrained`` leave all weights on disk, without accelerate's warning.

    Weights that it would convert go to ``folder``. The rest stays in the checkpoint's files. Under FSDP transformers
    would load them only on the first process, and would ignore the options.
    """
    logger = logging.getLogger("accelerate.big_modeling")
    level, sharded = logger.level, os.environ.pop(_FSDP_LOADS, None)
    logger.setLevel(logging.ERROR)
    try:
        yield {"device_map": {"": "disk"}, "offload_folder": folder}
    finally:
        logger.setLevel(level)
        if sharded is not None:
            os.environ[_FSDP_LOADS] = sharded


def take_offload_index(model: PreTrainedModel) -> dict[str, tuple[Path, str]]:
    """Where each weight of a model that was loaded with ``offloaded`` lies: name → (safetensors file, key).

    The hooks that would read them go. The index has no public name; a loader that returns it would replace this.
    """
    maps = (getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in model.modules())
    index = next(m.dataset.index if hasattr(m, "dataset") else m.index for m in maps if m is not None)
    _make_again(model)
    remove_hook_from_submodules(model)
    for name in ("hf_device_map", "to", "cuda", "npu", "xpu", "mlu", "musa", "sdaa", "neuron"):  # those that warn
        vars(model).pop(name, None)
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            del vars(module)["forward"]
    return {name: (Path(place["safetensors_file"]), place["weight_name"]) for name, place in index.items()}


def _make_again(model: PreTrainedModel) -> None:
    """Tensors that a class makes itself and no file has (sines of positions): the offload has dropped them.

    One that no class makes again holds NaN, or the least whole number, so that a result that it enters shows it.
    """
    made = []
    for path in _paths((model,)):
        module = path[-1]
        hook = getattr(module, "_hf_hook", None)
        kept = getattr(hook, "weights_map", None)
        if hook is None or kept is None:
            continue
        lost = [name for name, device in hook.original_devices.items() if device.type != "meta" and name not in kept]
        for name in lost:
            like = getattr(module, name)
            fresh = torch.full_like(like, _unset(like.dtype), device=hook.original_devices.pop(name))
            setattr(module, name, nn.Parameter(fresh, like.requires_grad) if name in module._parameters else fresh)
        if lost:
            made.append((path, lost))
            _initialise(path)
    for path, names in made:
        around = path[:-1]  # a class may make what the modules in it hold
        while around and any(_is_unset(getattr(path[-1], name)) for name in names):
            _initialise(around)
            around = around[:-1]


def _paths(path: tuple[nn.Module, ...]) -> Iterator[tuple[nn.Module, ...]]:
    """Each module, after all that it is in: the model, ..., the module."""
    yield path
    for child in path[-1].children():
        yield from _paths((*path, child))


def _initialise(path: tuple[nn.Module, ...]) -> None:
    """Let the innermost model around a module initialise it, whose class knows it: a vision tower is a model."""
    next(each for each in reversed(path) if isinstance(each, PreTrainedModel))._init_weights(path[-1])


def _unset(dtype: torch.dtype) -> float | int:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return 0 if dtype == torch.bool else torch.iinfo(dtype).min


def _is_unset(tensor: Tensor) -> bool:
    """Whether it is certain that no class has made a tensor again."""
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        return bool(tensor.isnan().any())
    return tensor.dtype != torch.bool and bool((tensor == _unset(tensor.dtype)).any())
