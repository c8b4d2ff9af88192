"""rehome: find another registered class with the same parameters, if a model's own config class refuses the cut.

Some config classes check more than the model needs (hidden_size % num_attention_heads with head_dim given). Another
class may have exactly the same parameters and compute the same function without that check. There is no table of such
classes: the registered causal language models are tried, those with the most similar config first. Equal names and
shapes do not prove equal logits, so the caller's check decides.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mptk.ir import Analysis, FamilyPlan, Plan, Program
from passes.targets.legalize import cut_shapes
from passes.targets.stock.attempt import Refusal, build_on_meta, hide_warnings, list_weight_shapes
from passes.targets.stock.config import StockConfig
from passes.targets.stock.learn import Stock
from passes.targets.stock.symbolic import WeightShapes
from passes.transforms.fold_norms import FoldNorms
from passes.transforms.rewrite import rewrite_program
from passes.verify import TOLERANCE

CANDIDATES = 32
"""Classes that are tried, of the hundreds that are registered: each needs a config, and a model without memory."""
TRIAL_LENGTH = 64
"""Tokens of a trial run that only an analysis or a hint needs. The cut itself is checked on longer samples."""


def find_other_class(
    config: PreTrainedConfig, target_shapes: WeightShapes, check: Callable[[StockConfig], float]
) -> StockConfig | Refusal:
    """Find a stock class other than ``config``'s own that can hold the cut model.

    Args:
        config: the config after the cut, which its own class refuses (``Refusal.config``).
        target_shapes: state-dict name → shape after the cut, tied names included.
        check: the largest logit difference between the class with the cut weights and the cut model
            (``make_logits_check``). It is called for every candidate that fits. Its inputs should be as long as the
            caller can afford. Differences up to ``TOLERANCE`` count as equal.

    Returns:
        The class and its config. ``changes`` holds every field that differs from ``config``, ``model_type`` included.
        Fields that only the new class has are None (off) if it accepts None. If no candidate fits, a Refusal
        (``names`` or ``numeric``).
    """
    # Only a class that fits is run. One that fits but computes something else is named in the refusal.
    refusals: list[str] = []
    for candidate in _list_candidates(config):
        result = _fit_candidate(config, candidate, target_shapes)
        if isinstance(result, StockConfig):
            objection = _find_objection(result, check)
            if objection is None:
                return result
            refusals.append(f"{result.model_class.__name__} fits but {objection}")
    own = type(config).__name__
    if refusals:
        return Refusal("numeric", own, "; ".join(refusals))
    return Refusal("names", own, f"none of the {CANDIDATES} most similar registered classes has these parameters")


def find_home(analysis: Analysis, stock: Stock, model: PreTrainedModel, widths: Mapping[str, int]) -> str | None:
    """The name of a class that holds ``model`` cut to ``widths`` with equal logits, if only its own validators refuse.

    The trial keeps the first units of each family and runs on random tokens; the result holds for any other units.

    Args:
        stock: what the model's own class can express (``legalize.discover``).

    Returns:
        None if the own class accepts the widths, or refuses them for another reason, or no class holds the model.
    """
    # Cut any units and fold norms as the real cut does. Whether a class holds the result does not depend on the units.
    folded = FoldNorms().run(rewrite_program(analysis, _plan_first_units(analysis, widths)))
    refusal = stock.build_config(widths, scalars=folded.epsilons)
    if isinstance(refusal, StockConfig) or refusal.config is None:
        return None
    # Only validators refused. Compare logits with the candidates', on random tokens: no text is at hand.
    embeddings = cast("nn.Embedding", model.get_input_embeddings())
    tokens = torch.randint(embeddings.num_embeddings, (1, TRIAL_LENGTH), generator=torch.Generator().manual_seed(0))
    found = find_other_class(refusal.config, cut_shapes(analysis, widths), make_logits_check(folded.program, tokens))
    return found.model_class.__name__ if isinstance(found, StockConfig) else None


def _plan_first_units(analysis: Analysis, widths: Mapping[str, int]) -> Plan:
    plans = {}
    for name, width in widths.items():
        variable = analysis.variable(name)
        units = (tuple(range(width)),)
        plans[name] = FamilyPlan(width, variable.size, {g.layer: units * g.scopes for g in variable.groups})
    return Plan(plans)


def make_logits_check(program: Program, tokens: Tensor) -> Callable[[StockConfig], float]:
    """A check for ``find_other_class``: the difference between a class with ``program``'s weights and ``program``.

    The difference is relative to the largest logit. ``tokens``: token ids [batch, sequence].
    """
    state = program.state_dict()
    with torch.no_grad():
        expected = program(tokens)

    def check(stock: StockConfig) -> float:
        # The class shares the program's memory. Buffers that are not saved, such as rotary tables, are computed.
        with init_empty_weights():
            model = stock.model_class(copy.deepcopy(stock.config))
        model.load_state_dict(state, assign=True)
        with torch.no_grad():
            logits = model.eval()(tokens, use_cache=False).logits
        return float((logits - expected).abs().max() / expected.abs().max())

    return check


def _find_objection(stock: StockConfig, check: Callable[[StockConfig], float]) -> str | None:
    try:
        difference = check(stock)
    except Exception as error:  # noqa: BLE001 (a model that takes these shapes may still fail to run)
        return f"does not run ({type(error).__name__}: {error})"
    return None if difference <= TOLERANCE else f"its logits differ by {difference:.2g}"


def _list_candidates(config: PreTrainedConfig) -> list[type[PreTrainedConfig]]:
    """The registered config classes nearest to ``config``: those with the fewest fields that only one of the two has.

    A missing field of ``config`` does not count if it has its default value. The nearest classes are sorted by the
    number of their own fields that cannot be switched off.
    """
    # What this config uses: its fields that differ from the class's defaults.
    own = _list_fields(type(config))
    default = type(config)().to_dict()
    used = {k for k, v in config.to_dict().items() if k in own and v != default.get(k)}
    others = [c for c in MODEL_FOR_CAUSAL_LM_MAPPING if _is_stock(c) and c is not type(config)]

    def measure_distance(other: type[PreTrainedConfig]) -> tuple[int, int, str]:
        names = _list_fields(other)
        return len(names - own) + len(used - names), len(own - names), other.__name__

    nearest = sorted(others, key=measure_distance)[:CANDIDATES]
    return sorted(
        nearest, key=lambda c: len(_list_fields(c) - own) - len(_find_optional_fields(c, _list_fields(c) - own))
    )


def _is_stock(cls: type[PreTrainedConfig]) -> bool:
    """Whether the class is part of transformers: the folder must load without other code."""
    return cls.__module__.startswith("transformers.") and dataclasses.is_dataclass(cls)


def _list_fields(cls: type[PreTrainedConfig]) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _find_optional_fields(cls: type[PreTrainedConfig], names: set[str]) -> dict[str, None]:
    """The ``names`` that ``cls`` accepts as None."""
    return {name: None for name in sorted(names) if _try_config(cls, {name: None}) is not None}


def _try_config(cls: Callable[..., PreTrainedConfig], body: Mapping[str, object]) -> PreTrainedConfig | None:
    with hide_warnings():
        try:
            return cls(**copy.deepcopy(dict(body)))
        except Exception:  # noqa: BLE001 (any error means that this class does not take these fields)
            return None


def _fit_candidate(
    config: PreTrainedConfig, candidate: type[PreTrainedConfig], target: WeightShapes
) -> StockConfig | None:
    """``candidate`` with the fields of ``config`` copied by name, if its model has the target's names and shapes.

    First only fields that the class declares are copied, then all, since a constructor may ask for others.
    """
    # Everything but what names the class.
    source = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    for key in ("model_type", "architectures", "transformers_version"):
        source.pop(key, None)
    # Fields that only the candidate has are switched off, since the model had no such thing.
    names = _list_fields(candidate)
    declared = {k: v for k, v in source.items() if k in names}
    off = _find_optional_fields(candidate, names - _list_fields(type(config)) - set(source))
    for body in (declared, source):
        found = _try_config(candidate, {**off, **body})
        if found is None:
            continue
        model_class = cast("type[PreTrainedModel]", MODEL_FOR_CAUSAL_LM_MAPPING[candidate])
        built = build_on_meta(model_class, found)
        if not isinstance(built, Refusal) and list_weight_shapes(built) == {
            name: tuple(shape) for name, shape in target.items()
        }:
            return StockConfig(model_class, found, _compare_configs(config, found))
    return None


def _compare_configs(old: PreTrainedConfig, new: PreTrainedConfig) -> dict[str, tuple[object, object]]:
    before, after = old.to_dict(), new.to_dict()
    ignored = {"architectures", "transformers_version", "_name_or_path"}
    return {
        key: (before.get(key), after.get(key))
        for key in sorted((before.keys() | after.keys()) - ignored)
        if before.get(key) != after.get(key)
    }
