"""accelerate: its global state, and models whose weights stay on disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import nn

_FSDP_LOADS = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""The variable by which accelerate tells transformers that only the first process loads weights."""


@contextlib.contextmanager
def separate_state(device: str = "auto") -> Iterator[None]:
    """Let Accelerators be made as if each were the first of this process. Afterwards the caller's state is back.

    ``device``: where a single process computes; ``auto``: as accelerate chooses.

    accelerate keeps one precision and one plugin for all Accelerators of a process, and refuses a second. It has no
    public way to set that state aside. The connection between the processes stays.
    """
    outer, meeting = dict(AcceleratorState._shared_state), dict(PartialState._shared_state)
    AcceleratorState._reset_state()
    # accelerate takes a device from the environment. With several processes the launcher has chosen one for each.
    chosen = {"ACCELERATE_USE_CPU": "1"} if device == "cpu" else {"ACCELERATE_TORCH_DEVICE": device}
    if device == "auto" or os.environ.get("WORLD_SIZE", "1") != "1":
        chosen = {}
    before = {name: os.environ[name] for name in chosen if name in os.environ}
    if chosen:
        PartialState._reset_state()  # it has read the device already
        os.environ.update(chosen)
    try:
        yield
    finally:
        for name in chosen:
            del os.environ[name]
        os.environ.update(before)
        AcceleratorState._reset_state()
        AcceleratorState._shared_state.update(outer)
        # Empty if this run was the first to connect the processes. They then stay connected, since a process group
        # cannot be set up twice.
        if meeting:
            PartialState._shared_state.update(meeting)


def keep_output_type(accelerator: Accelerator, model: nn.Module) -> None:
    """Let a module that accelerate has prepared give its outputs in the type in which they were computed.

    accelerate makes them float32. With a large vocabulary that copy, and the one back in the backward pass, are among
    the largest of a training step.
    """
    if (inner := vars(model).get("_original_forward")) is not None:
        model.forward = accelerator.autocast()(inner)


def without_autocast(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The module inside the wrappers of several processes, which computes in its own type again."""
    # Not ``unwrap_model(keep_fp32_wrapper=False)``: it would take transformers' decorators off ``forward``, too.
    whole: nn.Module = accelerator.unwrap_model(model)
    if (forward := vars(whole).pop("_original_forward", None)) is not None:
        whole.forward = forward
    return whole


@contextlib.contextmanager
def load_on_all() -> Iterator[None]:
    """Let each process load a model, also under FSDP, where transformers would load it only on the first."""
    before = os.environ.pop(_FSDP_LOADS, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[_FSDP_LOADS] = before
