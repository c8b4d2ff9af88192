"""onnx_proof: the prover of all ``OnnxForm``s, which runs graphs in ONNX Runtime; cases and samples that forms share.

In order: the stages of the proof; cases of graphs without a cache; what quantising may change; samples of other sizes,
for these graphs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mptk.config import Settings
from mptk.errors import ProofError
from mptk.ir import Program, Samples, is_tokens, join_outputs
from mptk.ort.sessions import OrtGraph
from mptk.protocols import Checks, Further, GraphCase, OnnxForm, Use
from mptk.tasks.inputs.base import PIXELS
from mptk.tasks.padding import PADDING_KEY, Unpadded, has_token_ids, pad_by_metadata, remove_padding, with_mask
from passes.targets.onnx.check_quantized import DIVERGENCES, compute_token_divergence
from passes.verify import HALF_TOLERANCE, RUNTIME_TOLERANCE, Difference, Placed, StageOutputs, split_outputs


def list_form_stages(form: OnnxForm, folder: Path, use: Use, device: torch.device, settings: Settings) -> Checks:
    """Stages of the proof: functions that run the graphs of ``folder`` on ``device``, tolerances, and providers.

    ``settings``: the form that the graphs must have.

    Raises:
        ProofError: a graph differs from what the settings ask for.
    """
    file = use.find_graph(folder / form.graphs[0])
    graphs = form.open(file, device)
    if form.explain_unfit is not None and (reason := form.explain_unfit(graphs, settings)) is not None:
        raise ProofError(
            f"the proof fails at '{form.cases[0].stage}': {file.name} {reason}; do not use it, and export the model "
            "again",
            name=file.name,
        )
    tolerance, ran = HALF_TOLERANCE if graphs.half else RUNTIME_TOLERANCE, graphs.providers[0]
    stages, further = dict[str, tuple[Program | StageOutputs, float]](), dict[str, Further]()
    for case in form.cases:
        if case.takes is not None:
            further[case.stage] = Further(partial(case.run, graphs, Use()), tolerance, partial(case.takes, graphs), ran)
        elif case.promise in ("", *graphs.metadata):
            stages[case.stage] = (partial(case.run, graphs, use), tolerance)
    return Checks(stages=stages, ran=dict.fromkeys(stages, ran), further=further)


def make_runner(form: OnnxForm, file: Path, device: torch.device) -> Callable[[Samples], Tensor]:
    """A function that runs a main graph as the program runs, with the graphs of its scheme beside it."""
    graphs = form.open(file, device)

    def run_whole(samples: Samples) -> Tensor:
        found = form.cases[0].run(graphs, Use(), samples)
        found = found.outputs if isinstance(found, Placed) else found
        return found if isinstance(found, Tensor) else join_outputs(found)

    return run_whole


# ---- cases of graphs without a cache, which run whole samples ----

GraphRun = Callable[[Any, Mapping[str, Tensor]], Tensor | Sequence[Tensor]]
"""Graphs and named inputs → what they compute: one output, or several."""


def compute_outputs(graph: OrtGraph, inputs: Mapping[str, Tensor]) -> Tensor | Sequence[Tensor]:
    """The graph's output, or its outputs."""
    found = graph.run_all(inputs)
    return found if len(found) > 1 else found[0]


def list_whole_cases(
    compute: GraphRun = compute_outputs, unpad: Unpadded = remove_padding
) -> tuple[GraphCase, GraphCase]:
    """The proof's samples, and the same with padding, if the metadata of the graphs promise that this works."""
    return (
        GraphCase("ONNX Runtime", partial(_run_plain, compute)),
        GraphCase("ONNX Runtime padded", partial(_run_padded, compute, unpad), PADDING_KEY),
    )


def _run_plain(compute: GraphRun, graphs: OrtGraph, use: Use, samples: Samples) -> Tensor | Sequence[Tensor]:
    return compute(graphs, with_mask(samples.inputs))


def _run_padded(
    compute: GraphRun, unpad: Unpadded, graphs: OrtGraph, use: Use, samples: Samples
) -> Tensor | Sequence[Tensor]:
    given, rows = pad_by_metadata(samples.inputs, graphs.metadata)
    found = compute(graphs, given)
    if isinstance(found, Tensor):
        return unpad(found[rows], samples.inputs)
    return [unpad(each[rows], samples.inputs) for each in found]


# ---- what quantising may change ----

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Outputs of the quantised graph and of the float graph."""

DISTANCES = {"fp16": 0.01, "int8": 0.1, "int4": 0.5}
"""Allowed distance of features, relative to their norm."""


def compare_logits(scheme: str, pairs: Pairs) -> Difference:
    """The divergence of the distributions, in nats."""
    apart = max(compute_token_divergence(*pair) for pair in pairs)
    return Difference(f"{scheme} logits", apart, apart, DIVERGENCES[scheme])


def compare_features(scheme: str, pairs: Pairs) -> Difference:
    """The distance of the features, relative to their norm."""
    apart = max(_compute_distance(*pair) for pair in pairs)
    return Difference(f"{scheme} features", apart, apart, DISTANCES[scheme])


USED = {"fp16": 0.01, "int8": 0.15, "int4": 0.15}
"""Allowed distance of a quantised graph's outputs, as it is used, from its own in one run without padding, relative to
their norm. A kernel for one token sums in another order than one for many, and the rounding of activations makes more
of it. SmolLM2-135M: at most 0.0005, 0.04 and 0.03. A mask that is ignored, or keys for values, give 0.5 and more."""


def use_apart(scheme: str, pairs: Sequence[tuple[Tensor | Placed, Tensor]]) -> Difference:
    """The distance of outputs at some positions from the outputs of whole samples, relative to their norm."""
    apart, whole = 0.0, 0.0
    for found, reference in pairs:
        for one, other in split_outputs(found, reference):
            apart += (one.double() - other.double()).square().sum().item()
            whole += other.double().square().sum().item()
    far = (apart / whole) ** 0.5 if whole else apart
    # NaN must not pass.
    far = far if far == far else float("inf")
    return Difference(f"{scheme} in use", far, far, USED[scheme])


def _compute_distance(found: Tensor, reference: Tensor) -> float:
    """‖f − f*‖ / ‖f*‖. NaN counts as infinite."""
    apart = ((found.double() - reference.double()).norm() / reference.double().norm()).item()
    return apart if apart == apart else float("inf")


# ---- samples of other sizes and values than the proof's own, drawn by a seed ----
#
# What a graph without a cache computes for a text depends on the whole text, so each length needs a run of the
# reference. The stages of a decoder run other sizes by themselves: a position's logits are the same however its text
# goes on.

OTHER_LENGTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 20, 31, 32, 33)
"""Tokens of a text: about powers of two, at which kernels and exporters change."""
MOST_ROWS = 9
"""Samples of a batch: one more than a power of two."""
TOKENS_TRIED = 96
"""Tokens of one batch, so that these cost little."""
TEXTS_TRIED = 4
"""Batches of texts."""
LARGEST = (6.0, 0.5, 16.0, 1.0, 64.0, 2.0, 255.0, 4.0, 0.0)
"""The largest value of each image of a batch: normalised ones, ones that a program forgot to normalise, a black one."""
DECODER = "decoder_"
"""What the names of inputs of a decoder start with: their lengths are another text's."""


def draw_texts(samples: Samples, seed: str) -> Iterator[Samples]:
    """Samples with other numbers of rows and of tokens; none if it is not clear which inputs belong to the tokens."""
    # An input with as many columns as the text, but other numbers than tokens, may belong to the tokens or not.
    read = {name for name, x in samples.inputs.items() if is_tokens(x) and not name.startswith(DECODER)}
    lengths = {samples.inputs[name].shape[1] for name in read}
    others = [x for name, x in samples.inputs.items() if name not in read and not name.startswith(DECODER)]
    if len(lengths) != 1 or samples.together is not None or any(x.shape[1:2] == (min(lengths),) for x in others):
        return
    draw = random.Random(seed)
    known = [length for length in OTHER_LENGTHS if length < min(lengths)]
    for length in draw.sample(known, min(TEXTS_TRIED, len(known))):
        count = draw.randint(1, min(MOST_ROWS, max(1, TOKENS_TRIED // length)))
        cut = {name: x[:, :length] if name in read else x for name, x in samples.inputs.items()}
        yield Samples(cut)[torch.arange(count) % len(samples)]


def draw_row_counts(samples: Samples, seed: str) -> Iterator[Samples]:
    """The samples, more of them at once."""
    if samples.together is None:
        yield samples[torch.arange(random.Random(seed).randint(4, MOST_ROWS)) % len(samples)]


def draw_batches(samples: Samples, seed: str, longer: bool) -> Iterable[Samples]:
    """Texts of other lengths; more of other samples at once."""
    if has_token_ids(samples.inputs):
        return draw_texts(samples, seed) if longer else ()
    return draw_row_counts(samples, seed)


def draw_scaled_batches(samples: Samples, seed: str, longer: bool) -> Iterable[Samples]:
    """``draw_batches``; images also with other values than the samples'."""
    found = draw_batches(samples, seed, longer)
    return map(scale_pixels, found) if PIXELS in samples.inputs and not has_token_ids(samples.inputs) else found


def scale_pixels(samples: Samples) -> Samples:
    """Images whose values are smaller and larger than the samples' own: each row has another largest value."""
    pixels = samples.inputs[PIXELS].clone()
    for row, largest in zip(pixels, LARGEST, strict=False):
        row *= largest / max(float(row.abs().max()), torch.finfo(torch.float32).tiny)
    return Samples({**samples.inputs, PIXELS: pixels})
