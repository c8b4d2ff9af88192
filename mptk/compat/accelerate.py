"""accelerate: set its global state aside for a run, and save a model whose weights are fetched one shard at a time."""

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
    """Within it an Accelerator is made as if it were the first of this process. Afterwards the caller's state is back.

    accelerate keeps one precision and one plugin for all Accelerators of a process, and refuses a second. It has no
    public way to set that state aside. The connection between the processes stays.
    """
    outer, meeting = dict(AcceleratorState._shared_state), dict(PartialState._shared_state)
    AcceleratorState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state()
        AcceleratorState._shared_state.update(outer)
        if meeting:  # if not, this run connected the processes
            PartialState._shared_state.update(meeting)


def save_lazily(shell: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path, *, max_shard_size: str) -> None:
    """Save ``shell``, a model on meta, with ``weights`` (state-dict name → tensor), fetched one shard at a time.

    ``save_pretrained`` does this for models that accelerate has offloaded to disk, so the shell is made to look like
    one. A ``save_pretrained`` that takes a lazy state dict would replace this.
    """
    hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights, place_submodules=False)
    add_hook_to_module(shell, hook)
    vars(shell)["hf_device_map"] = {"": "disk"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        shell.save_pretrained(folder, max_shard_size=max_shard_size)
