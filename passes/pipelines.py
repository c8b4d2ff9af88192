"""pipelines: the ordered lists of passes that the product runs. ``mptk passes`` prints them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import torch
from onnx_ir.passes import common

from mptk.errors import InputError, list_close_names
from mptk.ir import Analysis, Cut, Log, Pass, Program, run_passes
from mptk.ort.sessions import CPU
from passes.targets.onnx.attention import FoldKVPass, GroupQueriesPass
from passes.targets.onnx.block_weights import BLOCK, BlockWeightsPass, LookUpInBlocksPass
from passes.targets.onnx.emit import Interface, make_decoder_interface, write_onnx
from passes.targets.onnx.extract import ExtractPass, GraphPart
from passes.targets.onnx.float16 import Float16Pass
from passes.targets.onnx.gptq import GPTQPass
from passes.targets.onnx.lower import LowerComplex, LowerOps
from passes.targets.onnx.measure import Text
from passes.targets.onnx.names import ONNX_FILE
from passes.targets.onnx.quantize import list_evening_passes, write_quantized
from passes.targets.onnx.simplify import FoldConstantsPass, FoldTransposesPass, FusePass, RepeatAnglesPass, SimplifyPass
from passes.targets.onnx.slice_early import SliceEarlyPass
from passes.transforms.fold_norms import Folded, FoldNorms
from passes.transforms.masked_reference import Mask
from passes.transforms.remove_blocks import RemoveBlocks
from passes.transforms.rewrite import Rewrite
from passes.transforms.weight_types import Store

OnnxPasses = list[ir.passes.PassBase]

# ---- programs ----


def cutting(analysis: Analysis, cut: Cut, dtype: torch.dtype = torch.float32) -> list[Pass]:
    """The dense program → the pruned one, whose weights ``dtype`` holds exactly."""
    return [Rewrite(analysis, cut), RemoveBlocks(analysis, cut), FoldNorms(), Store(dtype)]


def reference(analysis: Analysis, cut: Cut) -> list[Pass]:
    """The dense program → the masked one. The pruned one must equal it."""
    return [Mask(analysis, cut)]


def lowering() -> list[Pass]:
    """A program → one that the ONNX exporter translates op by op."""
    return [LowerOps(), LowerComplex()]


# ---- ONNX graphs ----


def onnx_optimization(objective: str) -> OnnxPasses:
    """The exported ONNX graph → the one that is written."""
    return [
        # Inline the exporter's functions and fold constants, so that the patterns below meet plain nodes.
        common.InlinePass(),
        FoldTransposesPass(),
        FoldConstantsPass(),
        common.CommonSubexpressionEliminationPass(),
        SimplifyPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.IdentityEliminationPass(),
        # Fuse norms, rotary embeddings and attention, then fit the fused nodes to ONNX Runtime and to a cache.
        FusePass(),
        RepeatAnglesPass(),
        FoldKVPass(),
        SliceEarlyPass(),
        common.RemoveUnusedNodesPass(),
        GroupQueriesPass(rows=objective == "decode"),
        common.RemoveUnusedNodesPass(),
        # All constants become initializers, and equal ones become one.
        common.CommonSubexpressionEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
    ]


def extracting(part: GraphPart) -> OnnxPasses:
    """The optimised ONNX graph → one part of it."""
    return [ExtractPass(part), common.RemoveUnusedNodesPass()]


def _list_block_passes(bits: Literal[8, 4], source: Path) -> OnnxPasses:
    return [BlockWeightsPass(bits, source), LookUpInBlocksPass(source), common.RemoveUnusedNodesPass()]


def int8(source: Path) -> OnnxPasses:
    """The float ONNX graph → weights in 8-bit blocks."""
    return [*list_evening_passes(source), *_list_block_passes(8, source)]


def int4(source: Path) -> OnnxPasses:
    """The float ONNX graph → weights in 4-bit blocks, each rounded by itself."""
    return [*list_evening_passes(source), *_list_block_passes(4, source)]


def int4_for_text(source: Path, text: Text, device: torch.device = CPU) -> OnnxPasses:
    """The float ONNX graph → weights in 4-bit blocks, rounded for a text."""
    rounding = [GPTQPass(source, text, BLOCK, device), common.RemoveUnusedNodesPass()]
    return [*list_evening_passes(source), *rounding, *_list_block_passes(4, source)]


def fp16() -> OnnxPasses:
    """The float ONNX graph → float16."""
    return [Float16Pass()]


LISTS: tuple[Callable[..., Sequence[Pass | ir.passes.PassBase]], ...] = (
    cutting,
    reference,
    lowering,
    onnx_optimization,
    extracting,
    int8,
    int4,
    int4_for_text,
    fp16,
)
"""Every list, for ``mptk passes``."""

ONNX_SCHEMES = ("int8", "int4", "fp16")
"""The schemes of ``quantize_onnx``."""

# ---- runs ----


@dataclass(frozen=True)
class CutProgram:
    """The pruned program.

    ``exact``: the same before its weights were rounded to the stored type, which changes only folded norms.
    ``epsilons``: the norms' epsilons that the cut changed, old → new.
    """

    program: Program
    exact: Program
    epsilons: Mapping[float, float]


def cut_program(analysis: Analysis, cut: Cut, log: Log, dtype: torch.dtype = torch.float32) -> CutProgram:
    """Run ``cutting``, unproven. ``dtype``: the type in which weights are stored, which holds them exactly."""
    *_, folded, stored = run_passes(analysis.program, cutting(analysis, cut, dtype), log)
    assert isinstance(folded, Folded)
    # Without a folded norm the weights are slices of stored ones, which rounding does not change.
    exact = folded.program if folded.changed else stored.program
    return CutProgram(stored.program, exact, folded.epsilons)


def list_passes_until(name: str, analysis: Analysis, cut: Cut) -> list[Pass]:
    """The passes of ``cutting`` or ``reference`` up to the one named ``name``.

    Raises:
        MptkError: there is no such pass.
    """
    lists = (cutting(analysis, cut), reference(analysis, cut))
    for steps in lists:
        for count, step in enumerate(steps, 1):
            if step.name == name:
                return steps[:count]
    raise InputError(
        f"no pass {name!r}; choose one of: {', '.join(step.name for steps in lists for step in steps)}",
        name=name,
        nearest=list_close_names(name, [step.name for steps in lists for step in steps], cutoff=0),
    )


def emit_onnx(
    program: Program,
    folder: Path,
    interface: Interface | None = None,
    *,
    parts: Mapping[str, GraphPart] | None = None,
    objective: str = "decode",
    half: bool = False,
    metadata: Mapping[str, str] | None = None,
    log: Log | None = None,
) -> Path:
    """``write_onnx`` with the product's passes. Returns the (first) file that was written.

    ``interface``: names of inputs and outputs; None: a decoding step's. ``parts``: name of a file → the part of
    the graph that it holds; None: ``model.onnx`` holds all. ``objective``: ``"decode"`` or ``"prefill"``, the phase to
    be fast in if the two need different graphs. ``half``: convert the graph, which must be float32, to float16.
    """
    interface = make_decoder_interface(program) if interface is None else interface
    # The type is changed last, so that all patterns see float32.
    last = fp16() if half else []
    files = {ONNX_FILE: last} if parts is None else {file: [*extracting(part), *last] for file, part in parts.items()}
    write_onnx(
        program, folder, interface, lowering(), onnx_optimization(objective), files, metadata or {}, log or Log()
    )
    return folder / next(iter(files))


def quantize_onnx(
    source: Path, scheme: str, text: Text | None = None, log: Log | None = None, device: torch.device = CPU
) -> Path:
    """Write the scheme's graph and its weights beside ``source``, as ``names.quantized`` names it. Returns the file.

    Inputs and outputs keep their names and shapes. Only ``fp16`` changes a type: the KV cache is float16.

    Args:
        source: the float graph, a file of ``emit_onnx``.
        scheme: one of ``ONNX_SCHEMES``.
        text: calibration token ids [windows, length] for ``int4``; None: each weight is rounded by itself.
        log: is given a record of each pass.
        device: where the graph runs on ``text``.

    Raises:
        MptkError: there is no such scheme.
    """
    check_schemes([scheme])
    if scheme == "fp16":
        steps = fp16()
    elif scheme == "int8":
        steps = int8(source)
    else:
        steps = int4(source) if text is None else int4_for_text(source, text, device)
    return write_quantized(source, scheme, steps, log or Log())


def check_schemes(names: Iterable[str]) -> None:
    """Raise MptkError if a name is not in ``ONNX_SCHEMES``."""
    for name in names:
        if name not in ONNX_SCHEMES:
            raise InputError(
                f"unknown scheme {name!r}; choose one of {', '.join(ONNX_SCHEMES)}",
                name=name,
                nearest=list_close_names(name, ONNX_SCHEMES, cutoff=0),
            )
