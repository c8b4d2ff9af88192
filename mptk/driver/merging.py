"""merging: a model's KV heads become fewer while all its query heads stay, as a stock checkpoint of the same class.

The merge is of weights of the dense shapes, in which several heads are equal (``passes/transforms/merge_heads.py``). A
checkpoint with one head of each kind must then give the same logits, and this is proven.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from mptk.compat.accelerate import own_state
from mptk.compat.torch import sources_forgotten
from mptk.driver.prepare import check_whole
from mptk.driver.proof import check_proof, proof_batches
from mptk.driver.pruned import Shown, reporting
from mptk.driver.tracing import traced
from mptk.errors import MptkError, explained
from mptk.files import path_of
from mptk.io import models
from mptk.io.checkpoint import copy_processors
from mptk.io.data import read_places
from mptk.io.licence import copy_notices
from mptk.io.publish import check_apart, check_replaceable, publish
from mptk.ir.axes import axes_in
from mptk.ir.families import Analysis
from mptk.ir.program import Program
from mptk.ir.samples import Samples
from mptk.ir.weights import Weights
from mptk.methods.criteria.observe import OBSERVED_TOKENS, batches, find_sites
from mptk.methods.reconstruct import stored
from mptk.methods.trial import mean_losses
from mptk.progress import Progress
from mptk.run.execution import execution
from mptk.run.keywords import with_keywords
from mptk.run.settings import Settings
from mptk.run.values import short
from mptk.runtime.staged import Executor
from mptk.tasks import open_task
from passes.analysis import group
from passes.analysis.shared_heads import SharedHeads, find_shared_heads
from passes.targets.stock.attempt import Refusal
from passes.targets.stock.config import StockConfig, probe_config
from passes.targets.stock.emit import write_checkpoint
from passes.transforms.merge_heads import How, first_heads, merged_heads
from passes.verify import TOLERANCE, Difference, prove

COMPARED = 2048
"""Calibration tokens on which the losses are measured."""


@dataclass(frozen=True)
class Merged:
    """What was written.

    ``heads``: KV heads of each layer before and after. ``keys``, ``values``: how they were merged. ``losses``: of the
    dense and the merged model on calibration text. ``proof``: the reloaded checkpoint beside the merged weights.
    """

    folder: Path
    heads: tuple[int, int]
    keys: How
    values: How
    losses: tuple[float, float]
    proof: Difference

    @property
    def text(self) -> str:
        """What the command says."""
        ways = {"fit": "by principal components", "mean": "by their mean, since a norm or the like follows"}
        before, after = self.losses
        return (
            f"written to {self.folder}: {self.heads[1]} of {self.heads[0]} KV heads, all query heads\n"
            f"keys merged {ways[self.keys]}; values {ways[self.values]}\n"
            f"loss on calibration data {before:.3f} → {after:.3f}, nothing trained\n"
            f"reloaded checkpoint beside the merged weights: {self.proof.relative:.1e} of the largest output, ok"
        )


@sources_forgotten()
def merge_heads(
    model: str | Path,
    out: str | Path,
    kv_heads: int,
    settings: Settings | None = None,
    *,
    progress: Shown = "auto",
    **keywords: Any,
) -> Merged:
    """Write a model with ``kv_heads`` KV heads a layer and all its query heads as a stock checkpoint::

        mptk.merge_heads("HuggingFaceTB/SmolLM2-135M", "runs/merged", 1, data="c4.jsonl")

    Args:
        model: a hub id, folder, ``.gguf`` file or packaged alias.
        out: the folder to write.
        kv_heads: a divisor of the model's number; its keys and values, and so its KV cache, become that much smaller.
        settings, keywords: ``data``, ``samples`` and ``length`` say on what text heads are compared; ``memory``,
            ``device`` and ``trust_remote_code`` as in ``mptk.prune``.
        progress: as in ``mptk.prune``.

    Raises:
        MptkError: its attention has another form; its class holds no such number of KV heads; or ``out`` exists and
            was not made by mptk.
        ProofError: the checkpoint does not give the logits of the merged weights.
    """
    chosen = with_keywords(settings or Settings(), keywords)
    out = path_of(out)
    check_replaceable(out)
    check_apart(out, *[str(model)], *read_places(chosen.data))
    with reporting(progress) as say, own_state(chosen.device), explained():
        return _merged(str(model), out, kv_heads, chosen, say)


def _merged(model: str, out: Path, kv_heads: int, settings: Settings, say: Progress) -> Merged:
    resident, executor = execution(settings)
    say("load", 0, 0)
    loaded, task = open_task(model, resident, trust_remote_code=settings.trust_remote_code)
    check_whole(loaded, settings)
    say("analyse", 0, 0)
    analysis = group.analyze(traced(loaded, task, executor, settings.length))
    settings = replace(settings, length=task.only_length(analysis.program) or settings.length)
    layers, stock = held(analysis, loaded.model, kv_heads)
    given = task.samples(loaded, settings, settings.samples, partial(say, "calibration data"))
    say("merge", 0, 0)
    keys, values, changes = merged(analysis, layers, kv_heads, given, short(given, task.sequences), executor)
    changes = {name: tensor.to(loaded.dtype).to(tensor) for name, tensor in changes.items()}
    program = analysis.program.with_state(changes)
    with publish(out) as folder:
        say("write", 0, 0)
        write_checkpoint(
            sliced(program, layers, kv_heads).cast(loaded.dtype), stock, loaded.model, loaded.tokenizer, folder
        )
        copy_processors(loaded.path, folder, same_features=True)
        copy_notices(loaded.path, folder)
        say("prove", 0, 0)
        reloaded = models.load(str(folder), trust_remote_code=settings.trust_remote_code)
        stage = {"reloaded checkpoint": (partial(task.output, reloaded.model), TOLERANCE)}
        (proof,) = prove(program, stage, *proof_batches(given), executor=executor)
        check_proof([proof], "nothing was written; please report it")
    say("measure", 0, 0)
    programs = [lambda: analysis.program, lambda: program]
    dense, after = mean_losses(task, executor, programs, given.batches(COMPARED)[0], at_once=2)
    return Merged(out, (layers[0].groups.size, kv_heads), keys, values, (dense, after), proof)


def held(analysis: Analysis, model: PreTrainedModel, count: int) -> tuple[list[SharedHeads], StockConfig]:
    """The attention layers with their projections told apart, and the config with ``count`` KV heads.

    Raises:
        MptkError: no family is of KV heads, or the class of ``model`` holds no such config.
    """
    found, refusals = list[list[tuple[SharedHeads, ...]]](), dict[bool, str]()
    for family in analysis.families:
        try:
            found.append(find_shared_heads(analysis, family.name))
        except MptkError as error:
            refusals.setdefault("heads" in family.name or "KV" in family.description, str(error))
    every = [ways for each in found for ways in each]
    if not every:
        why = refusals.get(True, refusals.get(False, "nothing in it can be cut"))
        raise MptkError(f"{type(model).__name__} has no KV heads to merge: {why}")
    refused = None
    for way in range(max(map(len, every))):
        layers = [ways[min(way, len(ways) - 1)] for ways in every]
        config = config_for(analysis, model, layers, count)
        if isinstance(config, StockConfig):
            return layers, config
        refused = refused or config
    raise MptkError(
        f"{type(model).__name__} holds no {count} KV heads beside its query heads: {refused}; cut heads with prune"
    )


def config_for(
    analysis: Analysis, model: PreTrainedModel, layers: Sequence[SharedHeads], count: int
) -> StockConfig | Refusal:
    """The config of the merged model. Raises MptkError if ``count`` does not divide the number of KV heads."""
    shapes = {name: tuple(like.shape) for name, like in model.state_dict().items()}
    widths = dict[str, tuple[int, int]]()
    for layer in layers:
        size, each = layer.groups.size, 1 if layer.heads is None else layer.heads.size
        for name, (dim, positions) in first_heads(layer, count).items():
            for alias in (name, *(a for a, owner in analysis.program.aliases.items() if owner == name)):
                if alias in shapes:
                    shapes[alias] = (*shapes[alias][:dim], len(positions), *shapes[alias][dim + 1 :])
        widths |= {f"KV heads of {size}": (size, count), f"queries of {size}": (each, each * size // count)}
    own = {axis for layer in layers for axis in layer.scope}
    rest = axes_in(term for dims in analysis.weights.values() for term in dims) - own
    return probe_config(type(model), model.config, shapes, widths, [axis.size for axis in rest])


def merged(
    analysis: Analysis, layers: Sequence[SharedHeads], count: int, given: Samples, few: Samples, executor: Executor
) -> tuple[How, How, dict[str, Tensor]]:
    """How keys and values are merged, and the projections of all layers, in their own shapes.

    ``few``: samples that show whether heads that are turned, and turned back, change nothing.
    """
    program = analysis.program
    products = input_products(analysis, layers, given, executor)

    def changed(keys: How, values: How) -> dict[str, Tensor]:
        found = dict[str, Tensor]()
        for layer in layers:
            found |= merged_heads(layer, program.state, count, products.__getitem__, keys, values)
        return found

    def lets_through(keys: How, values: How) -> bool:
        turned = {"turned": (program.with_state(changed(keys, values)), TOLERANCE)}
        return all(d.ok for d in prove(program, turned, few, executor=executor))

    keys: How = "fit" if lets_through("turn", "keep") else "mean"
    values: How = "fit" if lets_through("keep", "turn") else "mean"
    return keys, values, changed(keys, values)


def input_products(
    analysis: Analysis, layers: Sequence[SharedHeads], given: Samples, executor: Executor
) -> Mapping[str, Tensor]:
    """Σ x xᵀ of the inputs x of each projection, with a 1 at the end of x: weight → float64 [in + 1, in + 1]."""
    names = {m.weight for layer in layers for m in (*layer.queries, *layer.keys, *layer.values)}
    streams = dict[tuple[fx.Node, int], list[str]]()  # queries, keys and values mostly share one
    for site in find_sites(analysis):
        if (name := stored(analysis.program, site.weight)) in names:
            streams.setdefault((site.x, site.x_dim), []).append(name)
    sums = dict[tuple[fx.Node, int], Tensor]()

    def see(stream: tuple[fx.Node, int], x: Tensor) -> None:
        rows = x.movedim(stream[1], -1).flatten(0, -2).float()
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        found = (rows.T @ rows).double().cpu()
        sums[stream] = sums[stream] + found if stream in sums else found

    inputs = [batch.tensors for batch in batches(analysis.program, given, OBSERVED_TOKENS)]
    executor.watch(analysis.program, inputs, [((stream[0],), partial(see, stream)) for stream in streams])
    return {name: sums[stream] for stream, reading in streams.items() for name in reading}


def sliced(program: Program, layers: Sequence[SharedHeads], count: int) -> Weights:
    """The state dict of the merged model: of heads that are equal, one stays."""
    places = {name: place for layer in layers for name, place in first_heads(layer, count).items()}

    def cut(name: str, tensor: Tensor) -> Tensor:
        dim, positions = places[name]
        return tensor.index_select(dim, positions.to(tensor.device))

    state = program.state_dict()
    owners = {name: program.aliases.get(name, name) for name in state}
    return state.changed({n: partial(cut, owner) for n, owner in owners.items() if owner in places}, moves=True)
