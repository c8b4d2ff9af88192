"""trace_module: trace a plain module, and compare a program with the module whose place it takes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

import passes.frontend.trace
from mptk.errors import MptkError
from mptk.io.live import choose_wide_type
from mptk.io.models import Loaded
from mptk.io.resident import measure_free_memory
from mptk.ir.program import Program
from mptk.ir.samples import Samples
from passes.frontend.bound import limit_processor_time
from passes.frontend.eager import GradientMode, compare_to_module
from passes.transforms.weight_types import Retype

TRACE_SECONDS = 120.0
"""Seconds of computing after which a plain module is traced for one size (with all open, Swin-T takes 530)."""


def compare_if_it_fits(program: Program, loaded: Loaded, example: Samples) -> Program:
    """Compare the program with its class if all weights fit in memory; else add a note."""
    if 4 * sum(p.numel() for p in loaded.model.parameters()) > measure_free_memory() / 2:
        return replace(program, limits=replace(program.limits, note="the class itself was not run, as it is too large"))
    return compare_to_module(program, _collect_weights(loaded), example.tensors)


def trace_module(loaded: Loaded, example: Samples) -> Program:
    """The program of a plain module, equal to the module itself, with as many symbolic sizes as possible.

    Raises:
        MptkError: no trace equals the module.
    """
    causes: list[MptkError] = []
    dynamic: bool | tuple[int, ...]
    for dynamic in (True, (0,), False):
        try:
            found = _trace_with_gradients(loaded, example, dynamic)
        except MptkError as error:
            causes.append(error)
            continue
        if causes:
            cause = str(causes[0]).partition(";")[0]
            kept = "batch size" if dynamic else "no size"
            found = replace(found, limits=replace(found.limits, note=f"{kept} is left open, since {cause}"))
        types = {like.dtype for like in found.state.likes.values() if like.is_floating_point()}
        if types <= {choose_wide_type(loaded.model)}:
            return found
        retyped = Retype(choose_wide_type(loaded.model))(found).program
        return loaded.with_weights(retyped)
    raise causes[0]


def _trace_with_gradients(loaded: Loaded, example: Samples, dynamic: bool | tuple[int, ...]) -> Program:
    """A trace that equals the module. Gradients are on, so that it trains alike, unless that changes outputs.

    Raises:
        MptkError: the trace fails, or is not the module.
    """
    try:
        with torch.enable_grad():
            return _trace_and_compare(loaded, example, dynamic)
    except GradientMode:
        with torch.no_grad():
            return _trace_and_compare(loaded, example, dynamic)


def _trace_and_compare(loaded: Loaded, example: Samples, dynamic: bool | tuple[int, ...]) -> Program:
    """The program in the module's own types, compared with the module."""
    name = type(loaded.model).__name__
    with (
        limit_processor_time(TRACE_SECONDS, f"the trace of {name} for inputs of any size")
        if dynamic is True
        else nullcontext()
    ):
        traced = passes.frontend.trace.trace_to_program(loaded.model, example.inputs, dynamic=dynamic)
    wide = loaded.with_weights(traced)
    own = {name: partial(Tensor.to, dtype=like.dtype) for name, like in traced.state.likes.items()}
    exact = replace(wide, state=wide.state.changed(own))
    return compare_to_module(exact, _collect_weights(loaded), example.tensors)


def _collect_weights(loaded: Loaded) -> Mapping[str, Tensor]:
    return {} if loaded.weights is None else loaded.weights
