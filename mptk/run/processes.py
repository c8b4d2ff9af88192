"""processes: the processes that work on a run together, and tensors that are spread over them (accelerate, FSDP2).

accelerate knows FSDP on accelerators only, and meets over gloo only if it is told that there are none. Both are settled
here, so that everything that runs on several devices can be run, and tested, on several processes of a CPU.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import fsdp2_prepare_model, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from mptk.errors import MptkError


def leads() -> bool:
    """Whether this process speaks for all. Unlike ``processes`` it does not make them meet."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> PartialState:
    """This process among those of the run. Whoever asks first settles how they meet."""
    return PartialState(cpu=not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"))


def accelerator(precision: str, **options: Any) -> Accelerator:
    """An Accelerator for the processes as they were launched, with FSDP2 if they were launched for it.

    Runs of one process with different precisions each need ``compat.accelerate.own_state`` around them.

    Raises:
        MptkError: they were launched for FSDP's first version.
    """
    wanted = processes().num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")
    # Every process loads the model: its analysis needs the weights.
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False) if wanted else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise MptkError("FSDP's first version flattens the weights that masks go into; add --fsdp_version 2")
    result = Accelerator(mixed_precision=precision, fsdp_plugin=plugin, **options)
    if plugin is not None:  # accelerate does this itself, but not on CPUs, and once in a process
        processes().distributed_type = result.state.distributed_type = DistributedType.FSDP
        result.state.fsdp_plugin = plugin
        if precision != "no":
            plugin.set_mixed_precision(precision)
    return result


def describe(acc: Accelerator) -> str:
    """How many processes train, in a few words; nothing for one."""
    if acc.num_processes == 1:
        return ""
    return f"trained on {acc.num_processes} processes" + (", its weights in shards (FSDP2)" if acc.is_fsdp2 else "")


def prepare(acc: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """``model`` and ``optimizer`` on their device. With FSDP2 the parameters of ``model`` are replaced by shards."""
    _wrap_blocks(acc, model)
    return acc.prepare(model, optimizer)  # type: ignore[no-any-return]


def sharded(acc: Accelerator, model: nn.Module) -> Any:
    """``model`` in shards, for its outputs alone; FSDP2 only."""
    _wrap_blocks(acc, model)
    return fsdp2_prepare_model(acc, model.requires_grad_(False))


def anywhere(acc: Accelerator, here: bool) -> bool:
    """``here`` or, where shards must be gathered from all processes, whether it is so for any of them."""
    if not acc.is_fsdp2:
        return here
    return bool(acc.reduce(torch.tensor(float(here), device=acc.device), "sum") > 0)


def _wrap_blocks(acc: Accelerator, model: nn.Module) -> None:
    """Let FSDP2 gather one block at a time, unless the launcher was told otherwise."""
    if acc.is_fsdp2 and "FSDP_AUTO_WRAP_POLICY" not in os.environ:
        acc.state.fsdp_plugin.auto_wrap_policy = transformer_auto_wrap_policy
        acc.state.fsdp_plugin.transformer_cls_names_to_wrap = list({type(block).__name__ for block in blocks(model)})


def blocks(model: nn.Module) -> list[nn.Module]:
    """A model's blocks: the members of its largest list of modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[]))


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over the processes; all of them must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, on the device of ``like`` and spread as that is."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


__all__ = [
    "accelerator",
    "anywhere",
    "blocks",
    "describe",
    "full",
    "leads",
    "prepare",
    "processes",
    "shard_like",
    "sharded",
]
