"""peft: adapters that are switched off for a moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.lora import LoraLayer


@contextlib.contextmanager
def adapters_off(model: PeftModel) -> Iterator[None]:
    """Within it the model computes without its LoRA adapters.

    peft's own ``disable_adapter`` first looks up the state of every module, which takes ten times as long, and its
    ``enable_adapters`` also changes which parameters are trained. A property that can be set would replace this.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
