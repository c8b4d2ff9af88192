"""peft: switch adapters off for a moment; which modules it refuses; adapt only the modules that a config names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

from peft import LoraConfig, PeftModel
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer
from peft.utils import transformers_weight_conversion
from torch import nn


@contextlib.contextmanager
def switch_off_adapters(model: PeftModel) -> Iterator[None]:
    """Let the model compute without its LoRA adapters. A property with a setter would replace this."""
    # peft's ``disable_adapter`` first looks up the state of all modules and takes ten times as long. Its
    # ``enable_adapters`` also changes which parameters are trained.
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def is_lora_refused(model: nn.Module, name: str) -> bool:
    """Whether peft refuses LoRA in a module of a model: Mamba's kernels read some weights past their modules.

    peft says so only while it changes the model. A public name for the check would replace this.
    """
    # A release without the check refuses nothing.
    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    try:
        if check is not None:
            check(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


@contextlib.contextmanager
def adapt_as_named() -> Iterator[None]:
    """Let peft adapt the modules that a config names. An option of the config would replace this."""
    # In a mixture of experts, peft takes ``gate_proj``, ``up_proj`` and ``down_proj`` for names of old checkpoints. It
    # would adapt the packed experts in place of the dense and shared layers of these names.
    with patch.object(transformers_weight_conversion, "convert_peft_config_for_transformers"):
        yield
