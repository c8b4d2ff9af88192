"""adapters: LoRA (Hu et al. 2021, arXiv 2106.09685) on all linear layers except the output head, with peft.

Also gradient checkpointing of the adapted model's blocks.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from functools import partial

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mptk.compat.peft import adapt_as_named, is_lora_refused
from mptk.distributed.processes import find_module_blocks, gather_tensor
from mptk.errors import MptkError


def adapt(model: PreTrainedModel, rank: int, seed: int, but: Container[str] = ()) -> PeftModel:
    """``model`` with LoRA of ``rank`` and scale 2, initialised from ``seed``. Its own weights are frozen in place.

    ``but``: modules without adapters.

    Raises:
        MptkError: no layer can have adapters.
    """
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    names = [name for name in linear if name not in but and not is_lora_refused(model, name)]
    if not names:
        raise MptkError(
            f"{type(model).__name__} has no linear layer for LoRA, with which masks are learned; give a one-shot "
            "--method, as wanda, and no --rank"
        )
    transposed = any(isinstance(m, Conv1D) for m in model.modules())
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=transposed)
    with torch.random.fork_rng(devices=[]), adapt_as_named():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def unwrap_adapters(model: PeftModel) -> nn.Module:
    """The wrapped module, whose submodules keep their names."""
    return model.base_model.get_submodule("model")


def merge_adapters(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Each adapted layer's (weight name, weight plus adapter), one at a time, on the device. The model does not change.

    If weights are sharded over processes, all processes must call it, and each gets whole weights.
    """
    for name, layer in unwrap_adapters(model).named_modules():
        if isinstance(layer, Linear):
            with torch.no_grad():
                weight = gather_tensor(
                    layer.get_base_layer().get_parameter("weight") + layer.get_delta_weight("default")
                )
            yield f"{name}.weight", weight


def recompute(model: nn.Module, on: bool) -> None:
    """Switch gradient checkpointing of the blocks on or off.

    transformers' own gradient checkpointing needs training mode, which would switch dropout on.
    """
    for block in find_module_blocks(model):
        if on:
            vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
        else:
            vars(block).pop("forward", None)
