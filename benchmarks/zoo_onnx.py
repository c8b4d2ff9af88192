"""The zoo in ONNX: every causal language model, cut and emitted with its KV cache, ONNX Runtime against torch.

    python -m benchmarks.zoo_onnx [--types A,B] [--jobs N] [--json FILE] [--quick]

Each type runs in a process of its own (``benchmarks/zoo.py``): one decoding step of a tiny random model is traced, the
dense step is compared with the model itself, all families are cut at random legal widths, and the cut step is written
as ONNX. Then a prompt of two rows, one padded on the left, and three decoding steps run in torch and in ONNX Runtime;
they are equal if no logit of a token differs by more than 1e-4 of the largest.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import torch
import typer
from torch import Tensor

from benchmarks.tiny_models import model_types, tiny_model
from benchmarks.tiny_roles import FIRST_PLAIN_TOKEN, VOCAB
from benchmarks.zoo import Jobs, RowsFile, Types, describe, difference, saved_rows, sweep
from benchmarks.zoo_plans import draw, legal_width
from mptk.ir import Analysis, Log, Plan, Program, resolve_plan
from mptk.ort.decoder import OrtDecoder
from passes.analysis.group import analyze_program
from passes.frontend.trace_decoder import (
    CacheLayerShape,
    DecoderStep,
    cache_shapes,
    list_first_positions,
    trace_decoder,
)
from passes.pipelines import cut_program, emit_onnx

MAPPING = "causal-lm"
STAGES = ("none", "build", "trace", "analyse", "cut", "emit", "run", "equal")
TOLERANCE = 1e-4
PROMPT, PADDING, STEPS = 9, 4, 3
QUICK = 16


class Differs(Exception):
    """Two of model, traced step and ONNX do not agree."""


def run_type(mapping: str, model_type: str) -> dict[str, Any]:
    """One row; ``stage`` is the last of ``STAGES`` that passed, ``reason`` why the next one did not."""
    row: dict[str, Any] = {"type": model_type, "mapping": mapping, "stage": "none", "reason": ""}
    try:
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            for facts in _stages(mapping, model_type, Path(folder)):
                row |= facts
    except Exception as error:
        row["reason"] = str(error) if isinstance(error, Differs) else describe(error)
    return row


def _stages(mapping: str, model_type: str, folder: Path) -> Iterator[dict[str, Any]]:
    """What each stage that passes adds to the row: its name and what was found."""
    model: Any = tiny_model(mapping, model_type).model
    yield {"stage": "build"}
    program = trace_decoder(model)
    layers = len(program.user_inputs) // 2 - 1  # ids, mask, positions, then keys and values
    shapes = cache_shapes(model)
    steps = list(decoding_steps(getattr(model.config.get_text_config(), "vocab_size", VOCAB)))
    yield {"layers": layers, **_against_model(model, program, steps, shapes)}
    yield {"stage": "trace"}
    analysis = analyze_program(program)
    yield {"stage": "analyse", "families": len(analysis.families)}
    cut = cut_program(analysis, resolve_plan(analysis, random_widths(analysis)), Log()).program
    yield {"stage": "cut"}
    file = emit_onnx(cut, folder)
    yield {"stage": "emit", "folded": folded(file)}
    found = in_runtime(OrtDecoder(file, threads=1), steps)
    yield {"stage": "run"}
    past = [n.meta["val"].shape for n in cut.list_placeholders() if n.name in cut.user_inputs][3:]
    cut_shapes = [CacheLayerShape(k[1], k[3], v[3], torch.float32) for k, v in zip(past[::2], past[1::2], strict=True)]
    wrong = largest_difference(found, in_torch(cut, steps, cut_shapes), steps)
    yield {"difference": float(f"{wrong:.1e}")}
    if not wrong <= TOLERANCE:
        raise Differs(f"ONNX Runtime differs from torch by {wrong:.1e}")
    yield {"stage": "equal"}


def random_widths(analysis: Analysis, seed: int = 0) -> Plan:
    """All families at random legal widths of half their size and more, at random units."""
    rng = random.Random(seed)
    return Plan({f.name: draw(f, legal_width(f, rng.uniform(0.5, 0.95)), rng) for f in analysis.families})


Step = tuple[Tensor, Tensor]


def decoding_steps(vocabulary: int) -> Iterator[Step]:
    """Token ids and mask [2, new] of a prompt, the second row padded on the left, and of three more tokens."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(FIRST_PLAIN_TOKEN, min(VOCAB - 30, vocabulary), (2, PROMPT + STEPS), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    for start, stop in pairwise((0, *range(PROMPT, PROMPT + STEPS + 1))):
        yield ids[:, start:stop], mask[:, start:stop]


Run = Callable[..., tuple[Tensor, ...]]


def in_torch(run: Run, steps: list[Step], shapes: list[CacheLayerShape]) -> list[Tensor]:
    """Logits of each step in torch, by the traced step or the model itself, from an empty cache."""
    past = [torch.zeros(2, shape.heads, 0, dim) for shape in shapes for dim in (shape.key_dim, shape.value_dim)]
    masks, outputs = [], []
    for ids, new in steps:
        masks.append(new)
        mask = torch.cat(masks, dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits, *past = run(ids, mask, positions, *past)
        outputs.append(logits)
    return outputs


def in_runtime(decoder: OrtDecoder, steps: list[Step]) -> list[Tensor]:
    """The same in ONNX Runtime."""
    cache, outputs = decoder.make_empty(2), []
    for index, (ids, mask) in enumerate(steps):
        if index == 0:
            logits, cache = decoder.prefill(ids.numpy(), mask.numpy())
        else:
            logits, cache = decoder.decode(ids.numpy(), cache)
        outputs.append(torch.from_numpy(np.array(logits)))
    return outputs


def largest_difference(found: list[Tensor], expected: list[Tensor], steps: list[Step]) -> float:
    """Over the logits of all tokens that are no padding, relative to the largest of a step."""
    kept = [mask == 1 for _, mask in steps]
    return max(difference(a[k], b[k]) for a, b, k in zip(found, expected, kept, strict=True))


def _against_model(model: Any, program: Program, steps: list[Step], shapes: list[CacheLayerShape]) -> dict[str, Any]:
    """Compare the traced step with the model's plain forward of each row without its padding.

    The whole row must agree. ``padding``: whether the padded one does, too; it must, unless it does not either when the
    model itself takes the same steps with the same mask and positions.
    """
    ids, mask = (torch.cat(parts, dim=1) for parts in zip(*steps, strict=True))
    alone = [model(input_ids=ids[r][mask[r] == 1][None], use_cache=False).logits[0] for r in range(2)]

    def differences(run: Run) -> tuple[float, float]:
        logits = torch.cat(in_torch(run, steps, shapes), dim=1)
        whole, padded = (difference(logits[r][mask[r] == 1], alone[r]) for r in range(2))
        return whole, padded

    whole, padded = differences(program)
    if not whole <= TOLERANCE:
        raise Differs(f"the traced step differs from the model by {whole:.1e}")
    if padded <= TOLERANCE:
        return {"padding": True}
    step = DecoderStep(model)
    for first in list_first_positions(step):
        step.first_position = first
        whole, padded = differences(step)
        if whole <= TOLERANCE and padded <= TOLERANCE:
            raise Differs("padding changes the logits of the traced step, but not the model's own")
    return {"padding": False}


def folded(file: Path) -> int:
    """How many Attention operators carry the cache."""
    graph = onnx.load(file, load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "Attention"]
    return sum(len(node.input) > 4 and node.input[4].startswith("past_key_values") for node in nodes)


def passed(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many types passed each stage."""
    reached = [STAGES.index(row["stage"]) for row in rows]
    return {name: sum(r >= index for r in reached) for index, name in enumerate(STAGES) if index}


def totals(rows: list[dict[str, Any]]) -> str:
    """How many types passed each stage, and in how many of the equal ones every layer's cache is folded."""
    whole = sum(row["stage"] == "equal" and row["folded"] == row["layers"] for row in rows)
    cells = [f"{name} {n}" for name, n in passed(rows).items()]
    return f"{len(rows)} types: {', '.join(cells)}; every layer's cache in Attention: {whole}"


def main(
    types: Types = "",
    jobs: Jobs = 1,
    json_file: RowsFile = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"Every {QUICK}th type only")] = False,
) -> None:
    """ONNX Runtime against torch for every causal language model; prints a row each and the totals."""
    rows = saved_rows(json_file)
    wanted = [t for t in model_types(MAPPING)[:: QUICK if quick else 1] if not types or t in types.split(",")]
    for row in sweep([(MAPPING, t) for t in wanted], rows, jobs, json_file, run_type):
        print(
            f"{row['type']:28} {row['stage']:8} {row.get('folded', '-'):>3}/{row.get('layers', '-'):<3} "
            f"{row.get('difference', '-'):>8} {row['seconds']:6.1f}s  {row['reason'][:400]}",
            flush=True,
        )
    print(totals(rows))


if __name__ == "__main__":
    typer.run(main)
