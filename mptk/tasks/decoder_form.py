"""decoder_form: a causal language model as ONNX: one decoding step with its KV cache."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from mptk.config import Settings
from mptk.errors import ModelError
from mptk.ir import Samples, make_token_samples
from mptk.ort.decoder import Cache, Ids, OrtDecoder
from mptk.progress import step
from mptk.protocols import PROOF_SHAPE, Dense, GraphCase, OnnxForm, Traced, Use
from mptk.tasks.inputs.base import POSITIONS
from mptk.tasks.model_form import LOGITS
from mptk.tasks.onnx_proof import MOST_ROWS, compare_logits
from mptk.tasks.runtimes import GENAI_FILE, write_genai_config
from passes.frontend.trace_decoder import trace_decoder
from passes.targets.onnx.emit import make_decoder_interface
from passes.verify import Placed

PADDED_TOKENS = 3
"""Tokens of padding beside the longest prompt."""


@dataclass(frozen=True)
class DecodingCase:
    """A way to run a decoder.

    ``steps``: tokens of the short calls that cross each border and end the sequence. ``padded``: the side on which
    prompts of several lengths are padded; empty: all have the same length.
    """

    steps: tuple[int, ...] = ()
    padded: str = ""

    def split_calls(self, rows: int, length: int, crossed: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of each row's prompt, and of each call after them, in samples [rows, length].

        Padding between prompt and answer counts in a window, also in torch: then only the prompt is comparable.
        """
        if self.padded:
            # 1. Padded prompts, each of another length: the longest, then two and one thirds of it, again and again.
            longest = max(1, min(LONGEST_PROMPT, length - sum(self.steps)))
            if self.padded == "right" and any(longest + PADDED_TOKENS + sum(self.steps) > border for border in crossed):
                return replace(self, steps=()).split_calls(rows, length, ())
            prompts = [max(1, longest * (SHARES - row % SHARES) // SHARES) for row in range(rows)]
            return prompts, list(self.steps)
        # 2. Prompts of one length. Before each border and before the end the calls are short (``steps``), so that one
        # of them crosses it; between these the tokens go in one call.
        borders = [border - sum(self.steps) // 2 for border in crossed if border + sum(self.steps) <= length]
        starts = [max(1, start) for start in (*borders, length - sum(self.steps))] if self.steps else []
        cuts = {start + done for start in starts for done in accumulate(self.steps, initial=0)}
        first, *others = sorted({cut for cut in cuts if cut < length} | {length})
        return [first] * rows, [later - sooner for sooner, later in pairwise([first, *others])]


LONGEST_PROMPT, SHARES = 24, 3
"""Tokens of the longest prompt that is padded, and of how many lengths prompts are."""
STEPS = (1, 1, 3, 1, 1)
"""Tokens of the calls after the prompt: a token behind another, several behind a cache, a token behind several."""
UNPADDED = DecodingCase(STEPS)
"""What runs a decoder without padding."""
SEVERAL_NEW = (33, 32, 31, 17, 16, 15, 9, 8, 7, 6, 5, 4, 3, 2)
"""Tokens of one call: a kernel may change at a power of two, and an exporter may fix a small number."""
FAR_BYTES = 1 << 26
"""The size of the cache that is as long as the model has positions; longer ones are cut off."""
FAR_TOKENS = 3
"""New tokens after that cache."""


def trace_step(dense: Dense, samples: Samples | None) -> Traced:
    """One decoding step, with its cache."""
    settings, model = dense.settings, dense.loaded.model
    step(0, 0, "trace a decoding step")
    # Without a program the model holds the weights and is the reference itself.
    run = None if dense.program is None else lambda ids: dense.compute_first(make_token_samples(ids))
    program = trace_decoder(
        model, logits=settings.logits, weights=dense.put_weights, dense=run, executor=dense.executor
    )
    # The graph is translated in float32 and then converted.
    wanted = settings.onnx_dtype
    if wanted != "auto" and model.dtype is not torch.float32:
        raise ModelError(
            f"a {wanted} graph needs a float32 model, not {model.dtype}; call model.float()", name=type(model).__name__
        )
    axes = make_decoder_interface(program).inputs
    return Traced(program, list(axes), axes, about={"objective": settings.objective})


def explain_other_logits(decoder: OrtDecoder, settings: Settings) -> str | None:
    """Why the logits are not of the positions that the settings ask for; None if they are."""
    right = decoder.last_only == (settings.logits == "last")
    return None if right else f"does not give the logits of {settings.logits} positions"


def decode_samples(case: DecodingCase, decoder: OrtDecoder, use: Use, samples: Samples) -> Placed:
    """The logits of the prompts and of all calls after them, with their positions.

    ``samples``: of what the decoder reads, and positions, [samples, axes, length], if they do not count tokens. If
    prompts are padded and calls follow, there is one more row, whose prompt is only padding.
    """
    tokens = samples.inputs[decoder.reads]
    prompts, calls = case.split_calls(len(tokens), tokens.shape[1], use.crossed)
    of = torch.arange(len(tokens))
    # One more row starts with only padding, and then gets the first sample's tokens.
    if case.padded and calls:
        prompts, of = [*prompts, 0], torch.cat([of, of[:1]])
    width = max(prompts) + (PADDED_TOKENS if case.padded else 0)
    first = torch.stack([_place(count, width, case.padded) for count in prompts])
    return decode_calls(decoder, samples, of, first, calls)


def decode_calls(
    decoder: OrtDecoder, samples: Samples, of: Tensor, first: Tensor, calls: Sequence[int], cache: Cache | None = None
) -> Placed:
    """The logits of a first call and of those after it, with their positions.

    ``of``: the sample of each row. ``first``: the positions of the first call's tokens, int64 [rows, n], -1 at padding.
    ``calls``: tokens of each call after it. ``cache``: before the first call, of padding; None: an empty one.
    """
    tokens, numbered = samples.inputs[decoder.reads][of], samples.inputs.get(POSITIONS)
    numbered = None if numbered is None else numbered[of]
    places, logits = list[Tensor](), list[Tensor]()
    done = (first >= 0).sum(1, keepdim=True)
    cache = decoder.make_empty(len(of)) if cache is None else cache
    before = list(accumulate(calls, initial=0))[:-1]  # the tokens of all calls before each
    for place in (first, *(done + start + torch.arange(n) for n, start in zip(calls, before, strict=True))):
        # The cache keeps the mask of the calls before; this is the new tokens' part.
        mask = (place >= 0).long().numpy()
        found, cache = decoder.step(
            _gather_places(tokens, place).numpy(), mask, cache, _gather_numbers(numbered, place)
        )
        logits.append(torch.from_numpy(found.copy()))
        places.append(place[:, -1:] if decoder.last_only else place)
    return Placed(torch.cat(logits, 1), torch.cat(places, 1), of)


def decode_sizes(decoder: OrtDecoder, use: Use, samples: Samples) -> Placed:
    """The logits of ``draw_size_cases``, and those behind a cache of padding as long as the model has positions."""
    tokens = samples.inputs[decoder.reads]
    runs = list[Placed]()
    for rows, (first, *calls) in draw_size_cases(decoder.metadata.get("plan_sha256", ""), tokens.shape[1]):
        of = torch.arange(rows) % len(tokens)
        runs.append(decode_calls(decoder, samples, of, torch.arange(first).expand(rows, -1), calls))
    # A cache of padding: its values must not matter, wherever a position's number, or a number of bytes, becomes large.
    past = min(use.positions, FAR_BYTES // decoder.count_position_bytes(len(tokens))) - FAR_TOKENS
    if past > 0 and tokens.shape[1] >= FAR_TOKENS:
        filled = decoder.make_filled(len(tokens), past)
        far = Cache(filled.values, np.zeros_like(filled.mask))
        of, first_tokens = torch.arange(len(tokens)), torch.arange(FAR_TOKENS).expand(len(tokens), -1)
        runs.append(decode_calls(decoder, samples, of, first_tokens, (), far))
    return join_runs(runs)


def join_runs(runs: Sequence[Placed]) -> Placed:
    """Runs with different numbers of rows and tokens as one, in which each output is a row."""
    flat = [
        (run.outputs.flatten(0, 1)[:, None], run.places.reshape(-1, 1), run.of, run.places.shape[1]) for run in runs
    ]
    of = [rows.repeat_interleave(count) for _, _, rows, count in flat if rows is not None]
    return Placed(torch.cat([x for x, *_ in flat]), torch.cat([x for _, x, *_ in flat]), torch.cat(of))


def draw_size_cases(seed: str, length: int) -> Iterator[tuple[int, list[int]]]:
    """Rows, and the tokens of each call, at most ``length`` together.

    For the proof's short rows: one token at a time, so that every length of the cache is met; each number of rows up to
    ``MOST_ROWS``; each of ``SEVERAL_NEW`` in one of them, in an order drawn by ``seed``. For a longer row: a step at
    each power of two beyond these, and beside it.
    """
    if length > PROOF_SHAPE[1]:
        # Cuts at powers of two and beside them, at which kernels change.
        powers = [1 << i for i in range(PROOF_SHAPE[1].bit_length(), length.bit_length())]
        cuts = sorted({near for power in powers for near in range(power - 1, power + 3) if near < length} | {length})
        yield 1, [later - sooner for sooner, later in pairwise([0, *cuts])]
        return
    yield 1, [1] * length
    # Every number of rows gets one token, and each other count goes to the rows that have the least work.
    calls = {rows: [1] for rows in range(1, MOST_ROWS + 1)}
    for count in SEVERAL_NEW:
        fitting = [rows for rows, found in calls.items() if sum(found) + count <= length]
        if fitting:
            calls[min(fitting, key=lambda rows: rows * (sum(calls[rows]) + count))].append(count)
    draw = random.Random(seed)
    for rows, found in calls.items():
        draw.shuffle(found)
        yield rows, found


def _gather_places(values: Tensor, places: Tensor) -> Tensor:
    """The values [rows, length, …] at some positions of each row, zeros at padding: [rows, n, …]."""
    found = values[torch.arange(len(values))[:, None], places.clamp(min=0)]
    return found.masked_fill((places < 0).reshape(*places.shape, *[1] * (values.ndim - 2)), 0)


def _gather_numbers(positions: Tensor | None, places: Tensor) -> Ids | None:
    """The numbers of the positions [rows, axes, length] at some places, [axes, rows, n], if there are any."""
    return None if positions is None else _gather_places(positions.transpose(1, 2), places).permute(2, 0, 1).numpy()


def _place(count: int, width: int, side: str) -> Tensor:
    """The positions of a row of ``count`` tokens, padded on one side: int64 [width], -1 at padding."""
    place = torch.full((width,), -1)
    start = width - count if side == "left" else 0
    place[start : start + count] = torch.arange(count)
    return place


DECODER_FORM = OnnxForm(
    trace_step,
    OrtDecoder,
    (
        GraphCase("ONNX Runtime prefill", partial(decode_samples, DecodingCase())),
        GraphCase("ONNX Runtime padded left", partial(decode_samples, DecodingCase(STEPS, "left"))),
        GraphCase("ONNX Runtime padded right", partial(decode_samples, DecodingCase(STEPS, "right"))),
        GraphCase("ONNX Runtime decode", partial(decode_samples, UNPADDED)),
        GraphCase("ONNX Runtime sizes", decode_sizes),
    ),
    compare_logits,
    (LOGITS,),
    explain_unfit=explain_other_logits,
    described={GENAI_FILE: write_genai_config},
)
"""``model.onnx`` takes token ids, mask, positions and the cache, and gives logits and the new cache."""
