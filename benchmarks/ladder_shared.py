"""Prototype: one set of weights for all sizes of a ladder, in which each step trains all sizes.

The sandwich rule and in-place distillation of slimmable networks (Yu & Huang 2019, arXiv 1903.05134): the largest size
imitates the dense model, each smaller one the largest, and all learn from the text. A smaller size is a slice of the
largest one's weights, but for the layers that reconstruction fits to a size (``consumers``): each size has its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mptk.api.pruned import defaults, job_of
from mptk.chain.ladder import climb, rungs
from mptk.compile.cut import small_model
from mptk.config.learning import FULL_RATE, LossWeights, Training
from mptk.io import data
from mptk.io.checkpoint import stored_dtype
from mptk.ir.passes import Log
from mptk.ir.samples import next_tokens
from mptk.methods.maskprune.losses import class_losses
from mptk.methods.maskprune.train import schedule
from mptk.methods.reconstruct import consumers
from mptk.progress import silent
from mptk.protocols.chain import Compiled
from mptk.protocols.values import Context


@dataclass(frozen=True)
class Size:
    """``places``: parameter → where it is in the largest size's, an index a dimension. ``own``: its own parameters."""

    module: nn.Module
    places: dict[str, list[Tensor]]
    own: dict[str, nn.Parameter]

    def weights(self, largest: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """Its parameters, as functions of the largest size's and of its own."""
        found: dict[str, Tensor] = dict(self.own)
        for name in self.places.keys() - self.own.keys():
            weight: Tensor = largest[name]
            for d, index in enumerate(self.places[name]):
                weight = weight if len(index) == weight.shape[d] else weight.index_select(d, index)
            found[name] = weight
        return found


def size_of(compiled: Compiled, largest: Compiled) -> Size:
    """A size as a slice of the largest one."""
    module = small_model(compiled, compiled.exact.state_dict())
    named, places = dict(module.named_parameters()), dict[str, list[Tensor]]()
    aliases = compiled.analysis.program.aliases
    for name in named:
        terms = compiled.analysis.weights[aliases.get(name, name)]
        pairs = [(largest.chosen.cut.positions(term), compiled.chosen.cut.positions(term)) for term in terms]
        places[name] = [torch.from_numpy(np.searchsorted(there, here)) for there, here in pairs]
    fitted = consumers(compiled.prepared.sites_of(compiled.chosen.plan))
    own = {} if compiled is largest else {name: named[name] for name in named if name in fitted}
    return Size(module, places, own)


def train_together(
    model: str, out: Path, sparsities: Sequence[float], steps: int, batch: int, how: Mapping[str, Any]
) -> None:
    """Write an untrained ladder into ``out`` and train its sizes for ``steps`` steps of ``batch`` windows.

    ``how``: the ladder's keywords.
    """
    job, settings = job_of(model, defaults(None, out, model, None), how, *[None] * 5)
    places = rungs(out, settings, sparsities, None)
    made = [found for _, found in climb(job(out), out, places, lambda _: Context(Log(), silent)) if found is not None]
    prepared = made[0].compiled.prepared
    sizes = [size_of(found.compiled, made[0].compiled) for found in made]
    shared = dict(sizes[0].module.named_parameters())
    trained = [*shared.values(), *(weight for size in sizes for weight in size.own.values())]
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in trained], lr=FULL_RATE, weight_decay=0.0, fused=True)
    loaded, s = prepared.loaded, prepared.settings
    windows = data.calibration(loaded.model, loaded.tokenizer, s.data, steps * batch, s.length)
    teacher = prepared.teacher()
    for step, ids in enumerate(windows.split(batch)):
        for group in optimizer.param_groups:
            group["lr"] = FULL_RATE * schedule(step, steps, Training.warmup)
        losses = one_step(sizes, shared, teacher, ids)
        nn.utils.clip_grad_norm_(trained, Training.clip)
        optimizer.step()
        optimizer.zero_grad()
        print(step + 1, *(f"{loss:.3f}" for loss in losses), flush=True)
    with torch.no_grad():
        for each, size in reversed(list(zip(places, sizes, strict=True))):
            size.module.load_state_dict(size.weights(shared), strict=False)
            size.module.to(stored_dtype(each.out)).save_pretrained(each.out)


def one_step(sizes: Sequence[Size], shared: dict[str, nn.Parameter], teacher: nn.Module, ids: Tensor) -> list[float]:
    """Add the gradients of all sizes; returns their losses."""
    how = {"input_ids": ids, "use_cache": False}
    targets = next_tokens(ids).targets
    assert targets is not None
    with torch.no_grad():
        wanted = teacher(**how).logits
    losses = []
    for i, size in enumerate(sizes):
        logits = functional_call(size.module, size.weights(shared), kwargs=how).logits
        loss = class_losses(logits, targets, wanted, LossWeights())["loss"]
        loss.backward()
        losses.append(float(loss.detach()))
        if i == 0:
            wanted = logits.detach()
    return losses
