"""steps: what ``bench`` times of a graph, with made-up inputs: a decoder's steps, or a whole run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
import torch

from mptk.errors import FileError, take_first_line
from mptk.ort.decoder import (
    DECODER_NAMES,
    ENCODER_FILE,
    HIDDEN,
    NUMPY_TYPES,
    PAST_KEYS,
    VISION_FILE,
    OrtDecoder,
)
from mptk.ort.graph_files import GRAPH_FILE, MERGED_FILE
from mptk.ort.sessions import CPU, WEIGHTS_FOLDER, open_file, open_session

PHASES = ("prefill", "decode")
"""Of a decoder with a cache. One that reads an encoder's output reads as many positions of it."""
WHOLE_RUNS = {MERGED_FILE: "decoder", GRAPH_FILE: "run"}
"""Main graph → what a run of it is called if it has no cache."""
PARTS = {MERGED_FILE: {"vision encoder": VISION_FILE, "encoder": ENCODER_FILE}}
"""Main graph → the other graphs of such a model that compute much."""
PACKED = "image_grid_thw"
"""An input with the sizes of packed images. A made-up one would not suit the other inputs."""


@dataclass(frozen=True)
class Case:
    """One measured run.

    ``phase``: of a decoder with a cache, ``prefill`` or ``decode``; else which graph runs. ``length``: tokens of the
    prompt, tokens in the cache before one decoding step, or tokens that the graph reads; 0 if it reads none.
    """

    phase: str
    length: int
    batch: int
    threads: int

    @property
    def tokens(self) -> int:
        """New tokens in one run; samples if the graph reads no tokens."""
        return self.batch * (1 if self.phase == "decode" else max(1, self.length))

    def __str__(self) -> str:
        length, batch = f" {self.length}" if self.length else "", f" ×{self.batch}" if self.batch > 1 else ""
        return f"{self.phase}{length}{batch}"


class Stepper(Protocol):
    """An open graph."""

    @property
    def providers(self) -> list[str]:
        """The execution providers that run it, the one that is asked first coming first."""
        ...

    def step(self, case: Case) -> Callable[[], None]:
        """A call that runs it once, with inputs and outputs bound beforehand."""
        ...


def open_stepper(file: Path, decodes: bool, threads: int, device: torch.device = CPU) -> Stepper:
    """An open graph. ``decodes``: it is a decoder with a cache."""
    plain = decodes and not takes_encoder_output(file)
    return Decoding(file, threads, device) if plain else WholeRun(file, threads, device)


class Decoding:
    """A decoder with its cache."""

    def __init__(self, file: Path, threads: int, device: torch.device) -> None:
        self.decoder = OrtDecoder(file, threads=threads, device=device)

    @property
    def providers(self) -> list[str]:
        return self.decoder.providers

    def step(self, case: Case) -> Callable[[], None]:
        return bind_decoder_step(self.decoder, case)


def bind_decoder_step(decoder: OrtDecoder, case: Case) -> Callable[[], None]:
    """A call that runs one step with inputs and outputs bound beforehand. Token ids and cached values do not matter."""
    prefill = case.phase == "prefill"
    cache = decoder.make_empty(case.batch) if prefill else decoder.make_filled(case.batch, case.length)
    ids = np.zeros((case.batch, case.length if prefill else 1), dtype=np.int64)
    mask = np.ones((case.batch, cache.length + ids.shape[1]), dtype=np.int64)
    # Bound once: the cost of a step does not depend on its numbers.
    binding = decoder.bind_step(ids, mask, cache)
    return lambda: decoder.session.run_with_iobinding(binding)


class WholeRun:
    """A graph that runs on made-up inputs: without a cache, or with an encoder's output."""

    def __init__(self, file: Path, threads: int, device: torch.device) -> None:
        self.file, self.session = file, open_file(file, device, threads)

    @property
    def providers(self) -> list[str]:
        return list(self.session.get_providers())

    def step(self, case: Case) -> Callable[[], None]:
        """Raises MptkError if it does not run with ``case.length`` tokens."""
        # The first run is not timed. It shows whether the graph takes these sizes.
        binding, sizes = self.session.io_binding(), choose_axis_sizes(self.file, case)
        for value in self.session.get_inputs():
            binding.bind_cpu_input(value.name, make_up_input(value, sizes))
        for value in self.session.get_outputs():
            binding.bind_output(value.name)
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:  # onnxruntime's errors have no base class
            raise FileError(
                f"{self.file} does not run on {case.batch} × {case.length}: {take_first_line(error)}; give other "
                "--lengths",
                name=self.file,
            ) from error
        return lambda: self.session.run_with_iobinding(binding)


def make_up_input(value: Any, sizes: Mapping[str, int]) -> npt.NDArray[np.generic]:
    """An input: masks of ones, ids of zeros, random numbers else."""
    shape = [size if isinstance(size, int) else sizes[size] for size in value.shape]
    if value.type == "tensor(bool)":
        return np.ones(shape, np.bool_)
    if value.type in NUMPY_TYPES:
        return np.random.default_rng(0).standard_normal(shape, np.float32).astype(NUMPY_TYPES[value.type])
    return np.full(shape, int("mask" in value.name), np.int64)


def find_phase_graphs(file: Path) -> dict[str, Path]:
    """Phase → the graph that runs in it, for a main graph and those of its scheme beside it."""
    # Such as ``_q4``: the graphs beside it are taken in the same scheme, or left out.
    main = next((name for name in WHOLE_RUNS if file.stem.startswith(Path(name).stem)), GRAPH_FILE)
    ending = file.stem.removeprefix(Path(main).stem)
    cached = any(name.startswith(PAST_KEYS) for name in read_input_axes(file))
    found = dict.fromkeys(PHASES if cached else (WHOLE_RUNS[main],), file)
    for phase, name in PARTS.get(main, {}).items():
        part = (file.parent / name).with_stem(Path(name).stem + ending)
        if part.is_file() and PACKED not in read_input_axes(part):
            found[phase] = part
    return found


def read_input_axes(file: Path) -> dict[str, list[str | int]]:
    """Input of a graph → the names of its open axes, and the sizes of others.

    Raises:
        MptkError: the file is not a graph.
    """
    try:
        graph = onnx.load(file, load_external_data=False).graph
    except Exception as error:  # protobuf's, which onnx does not name
        raise FileError(
            f"ONNX Runtime cannot load {file}: {take_first_line(error)}; export the model again", name=file
        ) from error
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}


def takes_encoder_output(file: Path) -> bool:
    """Whether a graph is the decoder of an encoder–decoder."""
    return DECODER_NAMES[HIDDEN] in read_input_axes(file)


def choose_axis_sizes(file: Path, case: Case) -> dict[str, int]:
    """Open axis of a graph's inputs → its size."""
    # An encoder's output may have a fixed length (Whisper's); else it is as long as the text.
    axes = read_input_axes(file)
    told = axes.get(DECODER_NAMES[HIDDEN], [0, case.length])[1]
    read = told if isinstance(told, int) else case.length
    found = {name: case.length for shape in axes.values() for name in shape if isinstance(name, str)}
    # In prefill the caches are empty. In decode they hold the text so far and the encoder's output.
    decodes = case.phase == "decode"
    known = {"decoder_sequence_length": 1} if decodes else {}
    known |= {"past_decoder_sequence_length": decodes * case.length, "past_encoder_sequence_length": decodes * read}
    known |= {name: case.batch for name in found if "batch" in name or name == "num_images"}
    return found | {name: size for name, size in known.items() if name in found}


def choose_lengths(file: Path, phase: str, lengths: Sequence[int]) -> Sequence[int]:
    """``lengths``, or 0 if no input has an axis of tokens."""
    # With a batch of 0, any other size than 0 is one of tokens.
    open_axes = choose_axis_sizes(file, Case(phase, length=1, batch=0, threads=1)).values()
    return lengths if phase in PHASES or any(open_axes) else (0,)


def measure_shapes(file: Path, names: Sequence[str], case: Case) -> dict[str, list[int]]:
    """The shapes that values of a graph without a cache have in a run."""
    if not names:
        return {}
    # The values become outputs of the graph, which is run once.
    proto = onnx.load(file, load_external_data=False)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = open_session(proto.SerializeToString(), entries={WEIGHTS_FOLDER: str(file.parent.resolve())})
    sizes = choose_axis_sizes(file, case)
    found = session.run(names, {value.name: make_up_input(value, sizes) for value in session.get_inputs()})
    return {name: list(value.shape) for name, value in zip(names, found, strict=True)}
