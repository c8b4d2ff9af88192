"""decoder_onnx: write a causal language model as ONNX with a KV cache, from the compiler's graph of a decoding step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mptk.errors import MptkError
from mptk.io.evaluation import LogitsFn
from mptk.ir.passes import Log
from mptk.ir.plan import Plan
from mptk.ir.program import Program
from mptk.ir.resolved_plan import resolve_plan
from mptk.progress import step
from mptk.staged.staged import EXECUTOR, Executor
from mptk.version import __version__
from passes.analysis import group
from passes.frontend.trace_decoder import LogitsScope, trace_decoder
from passes.pipelines import cut_program, emit_onnx, quantize_onnx


def export_decoder(
    model: PreTrainedModel,
    folder: Path,
    metadata: Mapping[str, str],
    *,
    plan: Plan | None = None,
    logits: LogitsScope = "all",
    quantize: Sequence[str] = (),
    text: Tensor | None = None,
    objective: str = "decode",
    onnx_dtype: str = "auto",
    log: Log | None = None,
    dtype: torch.dtype = torch.float32,
    weights: Callable[[Program], Program] = lambda program: program,
    dense: LogitsFn | None = None,
    executor: Executor = EXECUTOR,
) -> Path:
    """Write ``model.onnx`` and the quantised graphs; returns the file. Arguments and errors are as in ``mptk.export``.

    ``log`` is given a record of each pass. ``dtype``: the type that the checkpoint's weights are stored in; the graph's
    numbers are those, in the type that ``onnx_dtype`` names. ``weights``, ``dense``, ``executor``: as in
    ``trace_decoder``.
    """
    log = log or Log()
    step(0, 0, "trace a decoding step")
    program = trace_decoder(model, logits=logits, weights=weights, dense=dense, executor=executor)
    if onnx_dtype != "auto" and model.dtype is not torch.float32:
        raise MptkError(f"a {onnx_dtype} graph is made of a float32 model, not {model.dtype}; call model.float()")
    about = {"mptk_version": __version__, "objective": objective, **metadata}
    if plan is not None:
        analysis = group.analyze(program)
        program = cut_program(analysis, resolve_plan(analysis, plan), log, dtype).program
        about["plan_sha256"] = plan.digest
    step(0, 0, "translate the graph")
    half = onnx_dtype == "float16"
    file = emit_onnx(program, folder, objective=objective, half=half, metadata=about, log=log)
    for scheme in quantize:
        quantize_onnx(file, scheme, None if text is None else text.numpy(), log, executor.device)
    return file
