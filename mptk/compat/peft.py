"""peft: switch adapters off for a moment; which modules it refuses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft import LoraConfig, PeftModel
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer
from torch import nn


@contextlib.contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """Within it the model computes without its LoRA adapters.

    peft's ``disable_adapter`` first looks up the state of all modules and takes ten times as long. Its
    ``enable_adapters`` also changes which parameters are trained. A property with a setter would replace this.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def refuses_lora(model: nn.Module, name: str) -> bool:
    """Whether peft refuses LoRA in a module of a model: Mamba's kernels read some weights past their modules.

    It says so only while it changes the model. A public name for the check would replace this.
    """
    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    try:
        if check is not None:
            check(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False
