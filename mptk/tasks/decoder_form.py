"""decoder_form: a causal language model as ONNX: one decoding step with its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from mptk.ir.passes import Log
from mptk.ir.plan import Plan
from mptk.ir.program import Program
from mptk.ir.samples import Samples, next_tokens
from mptk.run.chain import stored_type
from mptk.run.onnx_form import Dense, OnnxForm
from mptk.run.values import Checks
from mptk.runtime.decoder import FILE, OrtDecoder
from mptk.tasks.decoder_onnx import export_decoder
from mptk.tasks.genai import write_genai_config
from mptk.tasks.rounding import logits_apart
from passes.verify import HALF_TOLERANCE, RUNTIME_TOLERANCE, Difference, StageOutputs

DECODED = 4
"""Number of decoding steps at the end of a sequence, and at each border."""


class DecoderForm(OnnxForm):
    """``model.onnx`` takes token ids, mask, positions and the cache, and gives logits and the new cache."""

    def export(self, dense: Dense, plan: Plan | None, samples: Samples | None, folder: Path, log: Log) -> list[str]:
        settings, loaded = dense.settings, dense.loaded
        export_decoder(
            loaded.model,
            folder,
            {"source": loaded.source, **dense.about},
            plan=plan,
            logits=settings.logits,
            quantize=settings.quantize,
            text=None if samples is None else samples.inputs["input_ids"],
            objective=settings.objective,
            onnx_dtype=settings.onnx_dtype,
            log=log,
            dtype=stored_type(settings, loaded),
            weights=dense.weighted,
            dense=lambda ids: dense.run(next_tokens(ids)),
            executor=dense.executor,
        )
        return []

    def stages(self, folder: Path, crossed: Sequence[int], device: torch.device) -> Checks:
        decoder = OrtDecoder(folder, device=device)
        tolerance = HALF_TOLERANCE if decoder.half else RUNTIME_TOLERANCE

        def prefill(samples: Samples) -> Tensor:
            return torch.from_numpy(decoder.prefill(samples.inputs["input_ids"].numpy())[0])

        def decode(samples: Samples) -> tuple[Tensor, list[int]]:
            return decoded(decoder, samples.inputs["input_ids"], crossed)

        stages: dict[str, tuple[Program | StageOutputs, float]] = {
            "ONNX Runtime prefill": (prefill, tolerance),
            "ONNX Runtime decode": (decode, tolerance),
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
        write_genai_config(config, generation, folder, f"{graphs}/{FILE}")

    def half(self, folder: Path) -> bool:
        return OrtDecoder(folder).half


def decoded(decoder: OrtDecoder, ids: Tensor, crossed: Sequence[int] = ()) -> tuple[Tensor, list[int]]:
    """Logits of decoding steps with a KV cache, [batch, steps, vocab], and their positions.

    Steps cross each border within the sequence, and its end. The tokens between are run in one call with the cache.
    """
    length = ids.shape[1]
    starts = [max(1, border - DECODED // 2) for border in crossed if border + DECODED <= length]
    single = sorted({p for start in (*starts, length - DECODED) for p in range(start, start + DECODED)})
    steps, cache, done = [], decoder.empty(len(ids)), 0
    for position in single:
        if position > done:
            _, cache = decoder.decode(ids[:, done:position].numpy(), cache)
        logits, cache = decoder.decode(ids[:, position : position + 1].numpy(), cache)
        steps.append(torch.from_numpy(logits.copy()))
        done = position + 1
    return torch.cat(steps, 1), single
