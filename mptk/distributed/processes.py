"""processes: the processes that work on a run together, and tensors that are spread over them (accelerate, FSDP2).

accelerate knows FSDP only on accelerators, and connects processes over gloo only if it is told that there are none.
Both are settled here, so that all that runs on several devices can be run, and tested, on several processes of a CPU.

Calibration is divided over the processes (``Sharing``): each takes consecutive batches, and all get the same result, so
that all make the same choice. Results are sums, so only their rounding depends on the number of processes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import broadcast_object_list, fsdp2_prepare_model, gather, parse_flag_from_env, reduce
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from mptk.compat.accelerate import keep_output_type
from mptk.errors import InputError, MptkError

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Found = TypeVar("Found")
# How long processes wait for one that works by itself (writes text, fits layers). torch's default of minutes would end
# the run. If a process dies, the launcher ends all.
PATIENCE = timedelta(hours=24)


def is_leader() -> bool:
    """Whether this process speaks for all."""
    # From the launcher's variable: asking accelerate would connect the processes, and so decide how they connect.
    return os.environ.get("RANK", "0") == "0"


def connect_processes() -> PartialState:
    """This process among the processes of the run. The first call decides how they connect."""
    cpu = not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=cpu, timeout=PATIENCE)


def make_accelerator(precision: str, **options: object) -> Accelerator:
    """An Accelerator for the processes as they were launched, with FSDP2 if they were launched for it.

    Runs of one process with different precisions each need ``compat.accelerate.separate_state`` around them.

    Raises:
        MptkError: they were launched for FSDP's first version.
    """
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False) if has_shards() else None
    if plugin is not None and plugin.fsdp_version != 2:
        raise InputError(
            "FSDP's first version flattens the weights that masks go into; add --fsdp_version 2", name="fsdp_version"
        )
    result = Accelerator(mixed_precision=precision, fsdp_plugin=plugin, **options)
    # accelerate itself does this, but not on CPUs, and only once in a process.
    if plugin is not None:
        connect_processes().distributed_type = result.state.distributed_type = DistributedType.FSDP
        result.state.fsdp_plugin = plugin
        # Only the first process has the weights, and sends out the shards. Set here, this affects only that; set above,
        # it would also let transformers load nothing on the other processes.
        plugin.cpu_ram_efficient_loading = True
        if precision != "no":
            plugin.set_mixed_precision(precision)
    return result


def describe_processes(acc: Accelerator) -> str:
    """How many processes train, in a few words; nothing for one."""
    if acc.num_processes == 1:
        return ""
    return f"trained on {acc.num_processes} processes" + (", its weights in shards (FSDP2)" if acc.is_fsdp2 else "")


def run_once(find: Callable[[], Found]) -> Found:
    """What ``find`` gives in the first process, for all of them. All must call this, in the same order."""
    if connect_processes().num_processes == 1:
        return find()
    # A refusal goes to all processes, too. If only the first raised it, the others would wait for a day.
    found: list[Any] = [None]
    if connect_processes().is_main_process:
        try:
            found = [find()]
        except MptkError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], MptkError):
        raise found[0]
    result: Found = found[0]
    return result


def has_shards() -> bool:
    """Whether the processes were launched to hold weights in shards."""
    return bool(connect_processes().num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP"))


def holds() -> bool:
    """Whether this process needs whole weights on its host. With FSDP2 only the first does, which sends out shards."""
    return bool(connect_processes().is_main_process) or not has_shards()


def make_replica(model: AnyModule, weights: bool = True) -> AnyModule:
    """A copy of the modules of ``model`` that shares its weights, so that it can be adapted or moved by itself.

    ``weights``: if False, the parameters' memory is never written, and so takes none.
    """
    # deepcopy takes what the memo has for an object in place of a copy of it.
    memo: dict[int, object] = {id(b): b for b in model.buffers()}
    for p in model.parameters():
        data = p.detach() if weights else torch.empty_like(p, device="cpu")
        memo[id(p)] = nn.Parameter(data, requires_grad=p.requires_grad)
    return copy.deepcopy(model, memo)


def prepare_training(acc: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """``model`` and ``optimizer`` on their device.

    With FSDP2 the parameters of ``model`` are replaced by shards of the first process's parameters.
    """
    _wrap_blocks(acc, model)
    prepared = acc.prepare(model, optimizer)
    keep_output_type(acc, model)
    return prepared  # type: ignore[no-any-return]


def place_model(acc: Accelerator, model: nn.Module) -> object:
    """``model`` on its device, only for its outputs; with FSDP2 in shards of the first process's parameters."""
    model.requires_grad_(False)
    if not acc.is_fsdp2:
        return model.to(acc.device)
    _wrap_blocks(acc, model)
    return fsdp2_prepare_model(acc, model)


def is_anywhere(acc: Accelerator, here: bool) -> bool:
    """``here`` or, if weights are in shards, whether any process says so: all must gather them, or none."""
    if not acc.is_fsdp2:
        return here
    return bool(acc.reduce(torch.tensor(float(here), device=acc.device), "sum") > 0)


def _wrap_blocks(acc: Accelerator, model: nn.Module) -> None:
    """Let FSDP2 gather one block at a time, unless the launcher was told otherwise."""
    if not acc.is_fsdp2:
        return
    # accelerate goes through the state dict and takes each entry for a parameter to shard, but buffers are whole on
    # every process. So they leave the state dict.
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer, persistent=False)
    if "FSDP_AUTO_WRAP_POLICY" not in os.environ:
        acc.state.fsdp_plugin.auto_wrap_policy = transformer_auto_wrap_policy
        acc.state.fsdp_plugin.transformer_cls_names_to_wrap = list(
            {type(block).__name__ for block in find_module_blocks(model)}
        )


def find_module_blocks(model: nn.Module) -> list[nn.Module]:
    """A model's blocks: the members of its largest list of modules, by parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=[]))


def gather_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over the processes. All must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_tensors(tensors: Iterable[tuple[str, Tensor]], *, keep: bool) -> dict[str, Tensor]:
    """Name → whole tensor, on the host; empty unless ``keep``. One at a time is whole on the device.

    If tensors are spread over the processes, all must call it.
    """
    found = {}
    for name, tensor in tensors:
        whole = gather_tensor(tensor.detach())
        if keep:
            found[name] = whole.cpu()
    return found


def find_widest_float(device: torch.device) -> torch.dtype:
    """The widest float type that ``device`` computes in."""
    # Apple's devices have no float64, and some of Intel's have none.
    narrow = device.type == "mps"
    if device.type == "xpu":
        narrow = not torch.xpu.get_device_properties(device).has_fp64
    return torch.float32 if narrow else torch.float64


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, on the device of ``like`` and spread like it."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    # Each process takes its own part: nothing is sent.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Sharing:
    """How many processes work on one thing, and which one this is."""

    count: int = 1
    index: int = 0

    def own(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """This process's part of ``batches``: consecutive ones, so that their order over all processes stays."""
        each, more = divmod(len(batches), self.count)
        start = self.index * each + min(self.index, more)
        return batches[start : start + each + (self.index < more)]

    def sum_all(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor. All must ask for it, in the same order."""
        if self.count == 1:
            return tensor
        summed: Tensor = reduce(tensor, "sum")
        return summed

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor, in their order. All must ask for it, in the same order."""
        return [tensor] if self.count == 1 else list(gather(tensor[None].contiguous()))


def share_batches(batches: int) -> Sharing:
    """How the processes share ``batches``. If there are fewer batches than processes, each process does everything."""
    # With shards (FSDP2), only the first process has the weights and does some work by itself: nothing is shared.
    there = connect_processes()
    if has_shards() or batches < there.num_processes:
        return Sharing()
    return Sharing(there.num_processes, there.process_index)
