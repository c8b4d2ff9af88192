"""checks: settings that no model can meet, and what a target cannot hold, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mptk.config import FREE, IN_MEMORY, UNIFORM, Settings
from mptk.conversions import find_conversions
from mptk.cost.budgets import LATENCY
from mptk.distributed.processes import has_shards
from mptk.errors import InputError
from mptk.io import data
from mptk.ir import Plan, check_engines
from mptk.methods import find_method
from mptk.plugins import explain_absent
from mptk.protocols import Target, list_stages
from mptk.targets import find_target, list_targets


def read_plan(settings: Settings) -> Plan | None:
    """The plan that the settings name. A run reads the file only once, so later changes of the file have no effect."""
    return None if settings.plan is None else Plan.load(settings.plan)


def check_settings(
    settings: Settings, plan: Plan | None = None, texts: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> None:
    """Raise MptkError for settings that no model can meet, and paths of data that are not there, before any work.

    ``plan``, ``texts``: a run's plan, and its texts in memory by setting.
    """
    data.read_places(*{settings.data, settings.eval_data} - {IN_MEMORY})
    method = find_method(settings.method)
    target = find_target(settings.target)
    check_engines(settings.engines, target.name)
    if not settings.fixed:  # a fixed run chooses nothing, so what the method cannot do does not matter
        method.check(settings)
        if settings.layers != UNIFORM:
            check_divides(settings, f"--layers {settings.layers}")
    find_conversions(settings, plan, texts)
    if settings.chooses_type:
        check_type_choice(settings)
    if settings.trains and not target.classed:
        check_graph_training(settings)
    if settings.learning.quantize_aware and has_shards():
        raise InputError("--quantize-aware needs whole weights in each process; leave it out", name="quantize_aware")
    for stage in list_stages():
        stage.check(settings)


def check_type_choice(settings: Settings) -> None:
    """Raise MptkError if the type of the graph and the sparsity cannot be chosen together."""
    if not any(stage.chooses_type for stage in list_stages()):
        raise InputError(
            f"nothing here chooses a type; {explain_absent() or 'give --quantize int8 or int4'}", name="quantize"
        )
    settings.check_free_amount()


def check_graph_training(settings: Settings) -> None:
    """Raise MptkError for ways of training that a graph's module does not support: it can only train all weights."""
    learning = settings.learning
    if learning.rank:
        raise InputError("--rank: LoRA needs the layers of a class; leave it out to train all weights", name="rank")
    if learning.gradient_checkpointing:
        raise InputError(
            "--gradient-checkpointing needs the blocks of a class; leave it out, or use --target stock",
            name="gradient_checkpointing",
        )
    if learning.quantize_aware:
        raise InputError(
            "--quantize-aware needs the layers of a class; leave it out, or use --target stock", name="quantize_aware"
        )
    if has_shards():
        raise InputError("FSDP needs the blocks of a class; leave it out, or use --target stock", name="target")


def check_divides(settings: Settings, asked: str) -> None:
    """Raise MptkError if layers cannot have different widths. ``asked``: what asks for them."""
    # The checkpoint must hold such layers, the method choose them, and the budget be a sum over layers.
    check_ragged(find_target(settings.target), asked)
    method = find_method(settings.method)
    if settings.layers == FREE and not method.divides:
        raise InputError(
            f"{asked}: {method.name} gives all layers one width; use a one-shot --method, as wanda", name="method"
        )
    if settings.budget == LATENCY:
        raise InputError(f"{asked} can divide only parameters, FLOPs or bytes; use another --budget", name="budget")
    if divider := settings.divider:
        raise InputError(
            f"{divider} only ranks shapes whose layers are alike; leave out {divider} or {asked}", name="layers"
        )


def check_ragged(target: Target, asked: str) -> None:
    """Raise MptkError, which names the targets that can, unless layers may have different widths in ``target``."""
    if not target.ragged:
        able = " or ".join(f"--target {each.name}" for each in list_targets().values() if each.ragged)
        raise InputError(
            f"{asked}: a {target.name} checkpoint has one width for all layers; use {able}, from which `mptk gguf` "
            "makes a file for llama.cpp if the model is a LLaMA",
            name="target",
        )
