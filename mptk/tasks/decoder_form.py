"""decoder_form: a causal language model as ONNX: one decoding step with its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from mptk.config.settings import Settings
from mptk.errors import MptkError, ProofError
from mptk.ir.passes import Log
from mptk.ir.plan import Plan
from mptk.ir.program import Program
from mptk.ir.samples import Samples, next_tokens
from mptk.ort.decoder import GRAPH_FILE, Ids, OrtDecoder
from mptk.progress import step
from mptk.protocols.onnx_form import Dense, OnnxForm
from mptk.protocols.values import Checks
from mptk.tasks.exporting import about, cut, logits_apart, quantised
from mptk.tasks.genai import GENAI_FILE, write_genai_config
from mptk.tasks.inputs.image_forms import POSITIONS
from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import emit_onnx
from passes.verify import HALF_TOLERANCE, RUNTIME_TOLERANCE, Difference, Placed, StageOutputs

PADDED_TOKENS = 3
"""Tokens of padding beside the longest prompt."""


@dataclass(frozen=True)
class DecodingCase:
    """A way to run a decoder, and the stage of the proof that it is.

    ``steps``: tokens of each call after the prompt; they cross each border, and end the sequence. ``padded``: the side
    on which prompts, each of another length, are padded; empty: all have the same length.
    """

    stage: str
    steps: tuple[int, ...] = ()
    padded: str = ""

    def calls(self, rows: int, length: int, crossed: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of each row's prompt, and of each call after them, in samples [rows, length].

        Padding between prompt and answer counts in a window, also in torch: then only the prompt is comparable.
        """
        if self.padded:
            longest = max(1, min(LONGEST_PROMPT, length - sum(self.steps)))
            if self.padded == "right" and any(longest + PADDED_TOKENS + sum(self.steps) > border for border in crossed):
                return replace(self, steps=()).calls(rows, length, ())
            prompts = [max(1, longest * (SHARES - row % SHARES) // SHARES) for row in range(rows)]
            return prompts, list(self.steps)
        borders = [border - sum(self.steps) // 2 for border in crossed if border + sum(self.steps) <= length]
        starts = [max(1, start) for start in (*borders, length - sum(self.steps))] if self.steps else []
        cuts = {start + done for start in starts for done in accumulate(self.steps, initial=0)}
        first, *others = sorted({cut for cut in cuts if cut < length} | {length})
        return [first] * rows, [later - sooner for sooner, later in pairwise([first, *others])]


LONGEST_PROMPT, SHARES = 24, 3
"""Tokens of the longest prompt that is padded, and of how many lengths prompts are."""
STEPS = (1, 1, 3, 1, 1)
CASES = (
    DecodingCase("ONNX Runtime prefill"),
    DecodingCase("ONNX Runtime padded left", STEPS, "left"),
    DecodingCase("ONNX Runtime padded right", STEPS, "right"),
    DecodingCase("ONNX Runtime decode", STEPS),
)
"""What the proof runs, on several short rows and on one long row."""


class DecoderForm(OnnxForm):
    """``model.onnx`` takes token ids, mask, positions and the cache, and gives logits and the new cache."""

    described = (GENAI_FILE,)

    def export(self, dense: Dense, plan: Plan | None, samples: Samples | None, folder: Path, log: Log) -> list[str]:
        settings, model, wanted = dense.settings, dense.loaded.model, dense.settings.onnx_dtype
        step(0, 0, "trace a decoding step")
        run = None if dense.program is None else lambda ids: dense.first(next_tokens(ids))
        program = trace_decoder(
            model, logits=settings.logits, weights=dense.weighted, dense=run, executor=dense.executor
        )
        if wanted != "auto" and model.dtype is not torch.float32:
            raise MptkError(f"a {wanted} graph needs a float32 model, not {model.dtype}; call model.float()")
        program = cut(program, dense, plan, log)
        step(0, 0, "translate the graph")
        said = {"objective": settings.objective, **about(dense, plan)}
        half, objective = wanted == "float16", settings.objective
        file = emit_onnx(program, folder, objective=objective, half=half, metadata=said, log=log)
        text = None if samples is None else samples.inputs["input_ids"]
        return quantised(dense, [file], text, log)

    def stages(self, folder: Path, crossed: Sequence[int], device: torch.device, settings: Settings) -> Checks:
        decoder = opened(folder / GRAPH_FILE, device, settings)
        tolerance = HALF_TOLERANCE if decoder.half else RUNTIME_TOLERANCE
        stages: dict[str, tuple[Program | StageOutputs, float]] = {
            case.stage: (partial(decoded, decoder, case, crossed), tolerance) for case in CASES
        }
        return Checks(stages=stages, ran=dict.fromkeys(stages, decoder.providers[0]))

    def outputs(self, file: Path, device: torch.device) -> Callable[[Samples], Tensor]:
        decoder = OrtDecoder(file, device=device)
        return lambda samples: torch.from_numpy(decoder.logits(samples.inputs["input_ids"].numpy()))

    def rounding(self, scheme: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> Difference:
        return logits_apart(scheme, pairs)

    def describe(
        self, config: PreTrainedConfig, generation: GenerationConfig | None, folder: Path, graphs: str
    ) -> None:
        write_genai_config(config, generation, folder, f"{graphs}/{GRAPH_FILE}")

    def half(self, folder: Path) -> bool:
        return OrtDecoder(folder).half


def opened(file: Path, device: torch.device, settings: Settings) -> OrtDecoder:
    """A decoder to prove. Raises ProofError if it has logits of other positions than the settings ask for."""
    decoder = OrtDecoder(file, device=device)
    if decoder.last_only != (settings.logits == "last"):
        raise ProofError(
            f"the proof fails at '{CASES[0].stage}': {file.name} does not give the logits of {settings.logits} "
            "positions; do not use it, and export the model again"
        )
    return decoder


def decoded(decoder: OrtDecoder, case: DecodingCase, crossed: Sequence[int], samples: Samples) -> Placed:
    """The logits of the prompts and of all calls after them, with their positions.

    ``samples``: of what the decoder reads, and positions, [samples, axes, length], if they do not count tokens.
    """
    tokens, numbered = samples.inputs[decoder.reads], samples.inputs.get(POSITIONS)
    prompts, calls = case.calls(len(tokens), tokens.shape[1], crossed)
    width = max(prompts) + (PADDED_TOKENS if case.padded else 0)
    places = [torch.stack([_place(count, width, case.padded) for count in prompts])]
    mask = (places[0] >= 0).long()
    first, positions = _at(tokens, places[0]).numpy(), _numbers(numbered, places[0])
    found, cache = decoder.prefill(first, mask.numpy(), positions)
    logits = [torch.from_numpy(found.copy())]
    done = torch.tensor(prompts)[:, None]
    for count in calls:
        places.append(done + torch.arange(count))
        found, cache = decoder.decode(_at(tokens, places[-1]).numpy(), cache, _numbers(numbered, places[-1]))
        logits.append(torch.from_numpy(found.copy()))
        done = done + count
    told = [place[:, -1:] for place in places] if decoder.last_only else places
    return Placed(torch.cat(logits, 1), torch.cat(told, 1))


def _at(values: Tensor, places: Tensor) -> Tensor:
    """The values [rows, length, …] at some positions of each row, zeros at padding: [rows, n, …]."""
    found = values[torch.arange(len(values))[:, None], places.clamp(min=0)]
    return found.masked_fill((places < 0).reshape(*places.shape, *[1] * (values.ndim - 2)), 0)


def _numbers(positions: Tensor | None, places: Tensor) -> Ids | None:
    """The numbers of the positions [rows, axes, length] at some places, [axes, rows, n], if there are any."""
    return None if positions is None else _at(positions.transpose(1, 2), places).permute(2, 0, 1).numpy()


def _place(count: int, width: int, side: str) -> Tensor:
    """The positions of a row of ``count`` tokens, padded on one side: int64 [width], -1 at padding."""
    place = torch.full((width,), -1)
    start = width - count if side == "left" else 0
    place[start : start + count] = torch.arange(count)
    return place
