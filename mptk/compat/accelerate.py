"""accelerate: global state that each run needs for itself, and weights that are fetched while a model is saved."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from accelerate import PartialState
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import PreTrainedModel


@contextlib.contextmanager
def own_state() -> Iterator[None]:
    """Within it Accelerators are made as the first of this process; afterwards the caller's own are as before.

    accelerate keeps one precision and one plugin for all Accelerators of a process, and refuses a second. It has no
    public way to set that state aside. How the processes meet stays as it is.
    """
    outer, meeting = dict(AcceleratorState._shared_state), dict(PartialState._shared_state)
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state()
        AcceleratorState._shared_state.update(outer)
        if meeting:  # else this run settled how the processes meet
            PartialState._shared_state.update(meeting)


def save_lazily(shell: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path, *, max_shard_size: str) -> None:
    """Save ``shell``, a model on meta, with ``weights`` (state-dict name → tensor), each asked for with its shard.

    ``save_pretrained`` does that for models whose weights accelerate has offloaded to disk, so the shell is made to
    look like one. It would be replaced by a ``save_pretrained`` that takes a lazy state dict.
    """
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights, place_submodules=False)
    add_hook_to_module(shell, hook)
    vars(shell)["hf_device_map"] = {"": "disk"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        shell.save_pretrained(folder, max_shard_size=max_shard_size)
