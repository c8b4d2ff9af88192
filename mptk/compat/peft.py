"""peft: switch adapters off for a moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.lora import LoraLayer


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
