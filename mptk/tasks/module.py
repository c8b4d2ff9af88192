"""module: any ``nn.Module`` that the caller gives with example inputs. What counts is how far its outputs move.

Example inputs, and samples like them, may be in a safetensors file: a tensor for each argument of ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptk.config import IN_MEMORY, INPUTS, Settings
from mptk.errors import DataError, FileError, InputError, ModelError, TargetError, find_exhaustion, take_first_line
from mptk.io import Loaded, Runs, load_tensors
from mptk.ir import Samples, separate
from mptk.progress import Count, Progress
from mptk.protocols import Dense, OnnxForm, SampleSets, Task, Traced, draw_nothing
from mptk.reading import Json
from mptk.tasks.base import Outputs, compute_output_errors, compute_projection, measure_figures, sum_output_distances
from mptk.tasks.inputs.base import count_measured_only, order_samples
from mptk.tasks.model_form import AXES, MODEL_FORM
from mptk.tasks.padding import IDS
from passes.frontend.trace import list_forward_arguments
from passes.targets.onnx.emit import TOKEN_AXES

BATCH_POSITIONS = 2048
"""Positions that are measured at once."""
OUTPUT_NAME = "output"
"""The name of a graph's output."""


@dataclass(frozen=True)
class Module(Task):
    """A module with one output or several, each with the samples in its first dimension. ``given``: example inputs."""

    given: Samples
    onnx: OnnxForm | None = field(init=False)
    name = "module"
    summary = "module"
    compares = True
    classes = False
    sequences = False

    def __post_init__(self) -> None:
        # The form names the graph's inputs by the examples. The dataclass is frozen.
        form = replace(MODULE_FORM, trace=partial(take_program, names=tuple(self.given.inputs)))
        object.__setattr__(self, "onnx", form)

    def explain_refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        return None

    def check(self, loaded: Loaded, run: Callable[[Samples], Any], example: Samples) -> None:
        try:
            found = run(self.given)
        except RuntimeError as error:
            if (lacking := find_exhaustion(error)) is not None:
                raise lacking from error
            raise DataError(
                f"{loaded.source} does not run on its example inputs ({take_first_line(error)}); give other ones",
                name="example_inputs",
            ) from error
        each = [found] if isinstance(found, Tensor) else found
        if not each or any(tensor.ndim < 1 or len(tensor) != len(self.given) for tensor in each):
            said = ", ".join(str(list(tensor.shape)) for tensor in each) or "nothing"
            raise ModelError(
                f"{loaded.source} gives {said} for {len(self.given)} samples; give a module whose outputs have the "
                "samples in their first dimension, as its inputs have",
                name=loaded.source,
            )

    def make_example(self, model: nn.Module) -> Samples:
        return self.given

    def draw_samples(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Samples:
        found = self._read(settings.data)
        return found[self._count_measured(found, settings) :][:count]

    def draw_evaluation(self, loaded: Loaded, settings: Settings) -> Samples:
        found = self._read(settings.eval_data or settings.data)
        return found[: self._count_measured(found, settings) or settings.eval_windows]

    def _count_measured(self, found: Samples, settings: Settings) -> int:
        """How many samples of a file are only measured on. Examples are few, and serve both."""
        return count_measured_only(len(found), settings) if settings.data.endswith(INPUTS) else 0

    def _read(self, data: str) -> Samples:
        """The samples of a file of inputs; without one the example inputs."""
        if not data.endswith(INPUTS):
            return self.given
        return order_samples(
            _make_samples(name_tensors((), read_inputs(data), self.given.inputs), data), self.given.inputs
        )

    def name_data(self, model: nn.Module, data: str) -> str:
        return data if data.endswith(INPUTS) else IN_MEMORY

    def compute_loss(self, output: Outputs, samples: Samples) -> Tensor:
        """Sum over samples of ‖f − f*‖² / ‖f*‖², f* the dense module's outputs (``targets``) in one row."""
        assert samples.targets is not None
        return compute_output_errors(output, samples.targets).sum()

    def compute_sensitivity(self, output: Outputs, samples: Samples) -> Tensor:
        return compute_projection(output, samples)

    def count_predictions(self, samples: Samples) -> int:
        return len(samples)

    def measure_quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> Json:
        batches = sets.evaluation.make_batches(BATCH_POSITIONS)
        protocol = (
            f"{sets.source}: mean over {len(sets.evaluation)} samples of the distance of all outputs from the dense "
            "module's, relative to their norm"
        )
        return measure_figures(runs, batches, {"distance": sum_output_distances}, progress, protocol)


def make_example_samples(module: nn.Module, inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> Samples:
    """Example inputs, by position or by name, as samples under the names of ``forward``'s arguments.

    One sample becomes two, since a trace takes a size of 1 for a constant.

    Raises:
        MptkError: ``forward`` has no names for them, or they are not tensors with samples in their first dimension.
    """
    # A transformers model is loaded in float32; a plain module keeps the types that its inputs have.
    names, plain = list_forward_arguments(module), not isinstance(module, PreTrainedModel)
    found = _order_inputs(names, name_tensors(names, inputs, None if plain else torch.float32))
    samples = _make_samples(found, "example inputs")
    return samples if len(samples) > 1 else samples.repeat(2)


def _make_samples(inputs: dict[str, Tensor], what: str) -> Samples:
    """Samples of these inputs. Raises MptkError unless all have as many; ``what``: what the error calls them."""
    sizes = {len(tensor) if tensor.ndim else 0 for tensor in inputs.values()}
    if len(sizes) != 1 or sizes == {0}:
        said = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items()) or "none"
        raise DataError(f"{what} need the samples in their first dimension, all as many; they are {said}", name=what)
    return Samples(inputs)


def _order_inputs(names: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs in the order of ``names``, then the inputs that ``forward`` takes by ``**``, in alphabetical order."""
    others = sorted(inputs.keys() - set(names))
    return {name: inputs[name] for name in (*names, *others) if name in inputs}


def read_inputs(file: str | Path) -> dict[str, Tensor]:
    """Inputs of ``forward`` by name, of a safetensors file.

    Raises:
        MptkError: the file cannot be read.
    """
    return load_tensors(
        Path(file),
        lambda why: FileError(
            f"cannot read inputs in {file} ({why}); write it with safetensors.torch.save_file: a tensor for each "
            "argument of forward, samples in the first dimension",
            name=file,
        ),
    )


def name_tensors(
    names: Sequence[str],
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    dtype: torch.dtype | Mapping[str, Tensor] | None = torch.float32,
) -> dict[str, Tensor]:
    """Inputs by name, on the CPU. ``names``: for inputs by position.

    ``dtype``: of floating ones; or examples, which have the types that these get; None: they keep theirs.

    Raises:
        MptkError: there are more than names, or one is not a tensor of numbers.
    """
    # Give each input a name.
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, Mapping):
        if len(inputs) > len(names):
            if not names:
                raise ModelError(
                    "forward takes its inputs by *args, and mptk needs a name for each; give forward named arguments, "
                    "as def forward(self, x, y)",
                    name="forward",
                )
            raise InputError(
                f"{len(inputs)} inputs by position and {len(names)} names; give them by name, as a dict",
                name="example_inputs",
            )
        inputs = dict(zip(names, inputs, strict=False))

    # Only dense tensors of numbers.
    odd = [name for name, value in inputs.items() if not isinstance(value, Tensor)]
    if odd:
        raise DataError(f"{odd[0]} is not a tensor but {type(inputs[odd[0]]).__name__}; give tensors only", name=odd[0])
    for name, tensor in inputs.items():
        _check_numbers(name, tensor)

    # Own tensors: what was made in torch.inference_mode cannot be trained on.
    plain = [tensor.clone() if tensor.is_inference() else tensor.detach() for tensor in inputs.values()]
    # One tensor that is given for two inputs becomes two, and a trace takes them for two.
    found = dict(zip(inputs, separate([tensor.cpu() for tensor in plain]), strict=True))
    # Numbers of a file get the types of the examples: whole ones for whole ones, fractions for fractions.
    if isinstance(dtype, Mapping):
        whole = [name for name in dtype.keys() & found.keys() if not is_fraction(dtype[name])]
        found |= {name: found[name].to(dtype[name].dtype) for name in whole if not is_fraction(found[name])}
    floats = {name: tensor for name, tensor in found.items() if tensor.is_floating_point() and dtype is not None}
    if isinstance(dtype, torch.dtype):
        return found | {name: tensor.to(dtype) for name, tensor in floats.items()}
    likes = {} if dtype is None else {n: like for n, like in dtype.items() if n in floats and like.is_floating_point()}
    return found | {name: floats[name].to(like.dtype) for name, like in likes.items()}


def is_fraction(tensor: Tensor) -> bool:
    """Whether a tensor holds other numbers than whole ones and truth values."""
    return tensor.is_floating_point() or tensor.is_complex()


def _check_numbers(name: str, tensor: Tensor) -> None:
    """Raise MptkError for a tensor that does not hold all its numbers in memory, each of them one."""
    kind = "on the meta device" if tensor.is_meta else "sparse" if tensor.layout is not torch.strided else ""
    if kind := kind or ("quantized" if tensor.is_quantized else ""):
        raise DataError(f"{name} is {kind}; give a dense tensor of numbers", name=name)
    if tensor.is_floating_point() and tensor.isnan().any():
        raise DataError(f"{name} holds NaN, which makes every output NaN; give finite numbers", name=name)


def take_program(dense: Dense, samples: Samples | None, names: Sequence[str]) -> Traced:
    """The analysed program. ``names``: of its inputs."""
    program = dense.program
    assert program is not None
    if program.keeps_state:
        raise TargetError(
            "the module changes its buffers, which a graph would forget after each call; leave out ONNX", name="onnx"
        )
    (results,) = program.graph.graph.output_node().args
    count = len(results) if isinstance(results, tuple | list) else 1
    outputs = tuple(f"{OUTPUT_NAME}_{i}" for i in range(count)) if count > 1 else (OUTPUT_NAME,)
    return Traced(program, names, outputs=outputs, padding={})


MODULE_FORM = replace(
    MODEL_FORM,
    axes={**AXES, IDS: TOKEN_AXES},
    other_axes=("batch_size",),
    draw=draw_nothing,  # what a module's inputs may be, only its author knows
)
"""``model.onnx`` with ``output``, or ``output_0``, ``output_1``, … of several."""
