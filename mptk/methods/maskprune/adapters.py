"""adapters: LoRA (Hu et al. 2021, arXiv 2106.09685) on every linear layer but the output head, by peft.

And gradient checkpointing of the adapted model's blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mptk.run.processes import blocks, full


def adapt(model: PreTrainedModel, rank: int, seed: int) -> PeftModel:
    """``model`` with LoRA of ``rank`` and scale 2, drawn from ``seed``; its own weights are frozen in place."""
    head = model.get_output_embeddings()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    transposed = any(isinstance(m, Conv1D) for m in model.modules())
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=transposed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def original(model: PeftModel) -> Any:
    """The module that was wrapped: its submodules have the names they had."""
    return model.base_model.model


@torch.no_grad()
def merged(model: PeftModel) -> dict[str, Tensor]:
    """Weight name → weight with its adapter added, for every adapted layer; the model stays as it is.

    Where weights are spread over processes, all of them must ask; each gets the whole.
    """
    return {
        f"{name}.weight": full(cast(Any, layer).get_base_layer().weight + cast(Any, layer).get_delta_weight("default"))
        for name, layer in original(model).named_modules()
        if isinstance(layer, LoraLayer)
    }


def recompute(model: nn.Module, on: bool) -> None:
    """Let blocks forget their activations and compute them again in the backward pass; or no longer.

    transformers' own gradient checkpointing does nothing outside training mode, in which dropout would be at work.
    """
    for block in blocks(model):
        if on:
            vars(block)["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
        else:
            vars(block).pop("forward", None)
