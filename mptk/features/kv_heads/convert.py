"""kv_heads: merge the KV heads of a dense model to fewer, with all query heads, before the run cuts the model.

The class is built with fewer heads; each starts as the first head of its run. When there are samples, the projections
are merged in closed form (``merge_projections``; ``merge_heads.py``), and the choice holds them like
trained weights. The model before the merge stays the reference for training and for quality.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Self

import torch
from torch import Tensor, fx
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.compat.transformers import match_configs
from mptk.config import Settings
from mptk.cost.budgets import CACHED, LATENCY
from mptk.errors import AnalysisError, BudgetError, InputError, ModelError, MptkError, PlanError
from mptk.features.kv_heads import KvHeadsSettings
from mptk.features.kv_heads.merge_heads import How, find_first_heads, merge_kv_heads, repeat_first_heads
from mptk.features.kv_heads.shared_heads import SharedHeads, find_shared_heads
from mptk.io import models, rebuild_model
from mptk.ir import Analysis, Entry, Program, Samples, Weights, collect_axes
from mptk.methods.criteria.observe import OBSERVED_TOKENS, find_sites, split_batches
from mptk.methods.reconstruct import name_operand_weight
from mptk.protocols import Analyse, Analysed, Change, Conversion
from mptk.staged.spool import Spool
from mptk.staged.staged import Executor
from passes.targets.stock.attempt import Refusal
from passes.targets.stock.config import StockConfig, probe_config
from passes.targets.stock.equations import Exponents
from passes.verify import TOLERANCE, StageOutputs, prove

KeyStream = tuple[fx.Node, int]
"""A value in a graph, and the dimension that is summed over."""


@dataclass(frozen=True, kw_only=True)
class MergedHeads(Conversion):
    """Each run of KV heads in a layer becomes one head. Before the fit it is the first head of its run.

    ``layers``: the projections of ``before``. ``of``, ``count``: KV heads in a layer, before and after. ``keys``,
    ``values``: how they were merged; ``keep`` if they are not merged yet.
    """

    name = "kv_heads"
    stage = "KV heads"
    settles = "how many KV heads stay"
    does = "merges KV heads"
    fits = "merge KV heads"
    label = "other --kv-heads"
    lever = (CACHED, "give --kv-heads to merge KV heads")

    layers: Sequence[SharedHeads]
    of: int
    count: int
    keys: How = "keep"
    values: How = "keep"

    @classmethod
    def find_change(cls, settings: Settings, texts: Mapping[str, Sequence[str]]) -> Change | None:
        if (count := KvHeadsSettings.of(settings).kv_heads) is None:
            return None
        # Only the merged model's latency is measured: a share of it is not a share of the dense model's.
        if settings.budget == LATENCY and settings.max_ms is None:
            raise InputError(
                "--kv-heads changes the latency that --sparsity would be a share of; give --max-decode-ms",
                name="kv_heads",
            )
        return partial(cls.merge, count, None)

    @classmethod
    def from_entry(cls, entry: Entry) -> Change:
        width, of = entry.get("width"), entry.get("of")
        if type(width) is not int or type(of) is not int or not 0 < width < of or of % width:
            raise PlanError(
                'plan: kv_heads: "width" and "of" must be integers, and "of" a multiple of "width"', name="kv_heads"
            )
        return partial(cls.merge, width, of)

    @classmethod
    def merge(cls, count: int, of: int | None, model: Analysed, analyse: Analyse) -> Conversion:
        """The conversion of ``model`` to ``count`` KV heads in each layer. ``of``: how many a plan says it has."""
        # The class must hold fewer heads: it is built anew with another config, and its weights are slices until the
        # fit.
        loaded = model.loaded
        if not isinstance(loaded.model, PreTrainedModel):
            raise ModelError(
                f"{type(loaded.model).__name__} has no config that could say the number of KV heads; leave out "
                "kv_heads",
                name=type(loaded.model).__name__,
            )
        layers, stock = find_mergeable_heads(model.analysis, loaded.model, count)
        found = layers[0].groups.size
        if of not in (None, found):
            raise PlanError(f"plan: kv_heads has {found} KV heads in this model, not {of}", name="kv_heads")
        small = rebuild_model(
            loaded,
            stock.config,
            _copy_stored_types(stock.config, models.read_stored_config(loaded)),
            _slice_first_heads(model, layers, count),
            tokenizer=loaded.tokenizer,
            generation=getattr(loaded.model, "generation_config", None),
            what=f"{count} KV heads",
            remedy="leave out --kv-heads",
        )
        return cls(model, analyse(small), stock.changes, layers=layers, of=found, count=count)

    @property
    def entry(self) -> Entry:
        return {"width": self.count, "of": self.of}

    @property
    def note(self) -> str:
        if "keep" in (self.keys, self.values):  # not in this run
            return ""
        ways = {
            "fit": "by principal components",
            "mean": "by their mean, since a norm or another nonlinear operator follows",
        }
        return (
            f"{self.of} KV heads of a layer became {self.count}, all query heads stay: "
            f"keys merged {ways[self.keys]}; values {ways[self.values]}"
        )

    def to_row(self) -> dict[str, object]:
        return {"of": self.of, "kept": self.count, **self.config_row}

    def make_equal_pair(self, executor: Executor) -> tuple[Program, Program | StageOutputs]:
        program = self.before.analysis.program
        changes = {n: change for layer in self.layers for n, change in repeat_first_heads(layer, self.count).items()}
        return program.with_state(program.state.with_edits(changes, moves=True)), self.after.analysis.program

    def fit_weights(self, samples: Samples, few: Samples, executor: Executor) -> Self:
        keys, values = choose_ways(self, few, executor)
        return replace(self, keys=keys, values=values, weights=merge_projections(self, samples, executor, keys, values))


def _slice_first_heads(model: Analysed, layers: Sequence[SharedHeads], count: int) -> Weights:
    """The checkpoint's weights with only the first KV head of each run."""
    loaded, analysis = model.loaded, model.analysis
    places = {name: place for layer in layers for name, place in find_first_heads(layer, count).items()}
    aliases, weights = analysis.program.aliases, Weights({}) if loaded.weights is None else loaded.weights
    owners = {name: aliases.get(name, name) for name in weights}
    return weights.with_edits(
        {name: partial(_slice, *places[owner]) for name, owner in owners.items() if owner in places}, moves=True
    )


def _slice(dim: int, positions: Tensor, tensor: Tensor) -> Tensor:
    return tensor.index_select(dim, positions.to(tensor.device))


def _copy_stored_types(config: PreTrainedConfig, stored: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config with the types of weights that ``stored`` names."""
    # The probed config has the type in which the model was loaded.
    made = copy.deepcopy(config)
    for own, like in match_configs(made, stored):
        own.dtype = like.dtype
    return made


# ---- which heads ----


def find_mergeable_heads(
    analysis: Analysis, model: PreTrainedModel, count: int
) -> tuple[list[SharedHeads], StockConfig]:
    """The attention layers with their query, key and value projections, and the config with ``count`` KV heads."""
    # A family may have its keys and values in several ways. The reason of a family that looks like heads is the one to
    # show.
    found, refusals = list[list[tuple[SharedHeads, ...]]](), dict[bool, str]()
    for family in analysis.families:
        try:
            found.append(find_shared_heads(analysis, family.name))
        except MptkError as error:
            refusals.setdefault("heads" in family.name or "KV" in family.description, str(error))
    every = [ways for each in found for ways in each]
    if not every:
        why = refusals.get(True, refusals.get(False, "nothing in it can be cut"))
        raise AnalysisError(f"{type(model).__name__} has no KV heads to merge: {why}", name=type(model).__name__)
    refused = None
    # The class decides which way is right: the first with which a config gives these shapes.
    for way in range(max(map(len, every))):
        layers = [ways[min(way, len(ways) - 1)] for ways in every]
        config = find_merged_config(analysis, model, layers, count)
        if isinstance(config, StockConfig):
            return layers, config
        refused = refused or config
    raise BudgetError(
        f"{type(model).__name__} cannot have {count} KV heads with its query heads: {refused}; leave out --kv-heads, "
        "and cut heads as a family",
        name="kv_heads",
    )


def find_merged_config(
    analysis: Analysis, model: PreTrainedModel, layers: Sequence[SharedHeads], count: int
) -> StockConfig | Refusal:
    """The config of the merged model. Raises MptkError if ``count`` does not divide the number of KV heads."""
    shapes = {name: tuple(like.shape) for name, like in model.state_dict().items()}
    widths, grown = dict[str, tuple[int, int]](), dict[tuple[str, int], Exponents]()
    for layer in layers:
        size, each = layer.groups.size, 1 if layer.heads is None else layer.heads.size
        family = f"KV heads of {size}"
        for name, (dim, positions) in find_first_heads(layer, count).items():
            for alias in (name, *(a for a, owner in analysis.program.aliases.items() if owner == name)):
                # A fused matrix has other rows beside the KV heads': it grows slower than their number.
                if alias in shapes and count < size:
                    old = shapes[alias][dim]
                    grown[alias, dim] = {family: Fraction(old - len(positions), old) * Fraction(size, size - count)}
                    shapes[alias] = (*shapes[alias][:dim], len(positions), *shapes[alias][dim + 1 :])
        widths |= {family: (size, count), f"queries of {size}": (each, each * size // count)}
    # A field of the config may be a product of these widths and of the other axes' sizes.
    own = {axis for layer in layers for axis in layer.scope}
    rest = collect_axes(term for dims in analysis.weights.values() for term in dims) - own
    return probe_config(type(model), model.config, shapes, grown, widths, [axis.size for axis in rest])


# ---- their weights ----


def choose_ways(merged: MergedHeads, few: Samples, executor: Executor) -> tuple[How, How]:
    """How keys and values are merged: ``fit`` if rotating heads and rotating them back changes no output on ``few``."""
    program, count = merged.before.analysis.program, merged.count

    # A norm between projection and product does not let factors through (``merge_heads.py``). Then
    # heads that are turned and turned back give other outputs.
    def choose_way(keys: How, values: How) -> How:
        made = Spool(executor.borders)
        for layer in merged.layers:
            for name, tensor in merge_kv_heads(layer, program.state, count, None, keys, values).items():
                made.add(name, tensor)
        turned = {"turned": (program.with_state(made.weights), TOLERANCE)}
        return "fit" if all(d.ok for d in prove(program, turned, few, executor=executor)) else "mean"

    # Keys and values separately: often only keys have a norm.
    return choose_way("turn", "keep"), choose_way("keep", "turn")


def merge_projections(merged: MergedHeads, samples: Samples, executor: Executor, keys: How, values: How) -> Weights:
    """The merged projections of all layers in their new shapes, made layer by layer."""
    program, count, made = merged.before.analysis.program, merged.count, Spool(executor.borders)

    def make(layer: SharedHeads, products: Mapping[str, Tensor]) -> None:
        places = find_first_heads(layer, count)
        for name, tensor in merge_kv_heads(layer, program.state, count, products.__getitem__, keys, values).items():
            made.add(name, _slice(*places[name], tensor) if name in places else tensor)

    with_products(merged, samples, executor, make)
    return made.weights


def with_products(
    merged: MergedHeads, samples: Samples, executor: Executor, made: Callable[[SharedHeads, Mapping[str, Tensor]], None]
) -> None:
    """Call ``made`` for each layer with the Σ x xᵀ of its projections' inputs x, as soon as they are known.

    The sums are float64 [in + 1, in + 1] by weight; x ends with a 1.
    """
    analysis = merged.before.analysis
    inputs = [batch.tensors for batch in split_batches(analysis.program, samples, OBSERVED_TOKENS)]
    reading = {
        name_operand_weight(analysis.program, site.weight): (site.x, site.x_dim) for site in find_sites(analysis)
    }
    # The batches that are left to see, by layer and by the value that its projections read: mostly one for all of them.
    waiting = {
        i: {reading[m.weight]: len(inputs) for m in (*layer.queries, *layer.keys, *layer.values) if m.weight in reading}
        for i, layer in enumerate(merged.layers)
    }
    sums = dict[tuple[int, KeyStream], Tensor]()

    def see(i: int, stream: KeyStream, x: Tensor) -> None:
        rows = x.movedim(stream[1], -1).flatten(0, -2).float()
        # The 1 gives the sums for biases.
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        found = (rows.T @ rows).double().cpu()
        sums[i, stream] = sums[i, stream] + found if (i, stream) in sums else found
        waiting[i][stream] -= 1
        # Sums are dropped as soon as a layer is merged.
        if not any(waiting[i].values()):
            known = {stream: sums.pop((i, stream)) for stream in waiting[i]}
            made(merged.layers[i], {name: known[stream] for name, stream in reading.items() if stream in known})

    watches = [((stream[0],), partial(see, i, stream)) for i, streams in waiting.items() for stream in streams]
    executor.watch(analysis.program, inputs, watches)
