"""onnx_form: how a kind of model is written as ONNX and proved, as data: its trace, its graphs, the cases of the proof.

One exporter (``mptk/tasks/onnx_export.py``) and one prover (``mptk/tasks/onnx_proof.py``) read these records. The
exporter gets the dense model and the plan, not the cut program: a decoder is traced anew, with a KV cache, and then
cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from mptk.config import Settings
from mptk.errors import TargetError
from mptk.io import Loaded
from mptk.ir import Program, Samples, is_tokens
from mptk.staged.staged import EXECUTOR, Executor
from passes.targets.onnx.names import CACHE, ONNX_FILE, Axes, name_quantized_file
from passes.verify import Difference, Placed


@dataclass(frozen=True)
class Dense:
    """A dense model to write as ONNX, in the type and the form that the settings name.

    ``program``: as its task traces it, with the weights that a method changed. None for a decoder whose model holds its
    weights and runs itself. ``about``: entries for the graphs' metadata, beside source, plan and versions.
    """

    loaded: Loaded
    settings: Settings
    program: Program | None
    executor: Executor = EXECUTOR
    about: Mapping[str, str] = field(default_factory=dict)

    def put_weights(self, program: Program) -> Program:
        """Another trace of the same model, with the weights of this one."""
        if self.program is None:
            return self.loaded.with_weights(program)
        return self.loaded.with_weights(program).with_state(self.program.collect_module_state())

    def compute_first(self, samples: Samples) -> Tensor:
        """The program's first output."""
        assert self.program is not None
        found = next(self.executor.run_programs([self.program], [samples.tensors]))
        output: Tensor = found if isinstance(found, Tensor) else found[0]
        return output


@dataclass(frozen=True)
class Use:
    """How graphs are used in a proof, and which.

    ``crossed``: positions that decoding must cross. ``positions``: how many the model has; 0: not known. ``scheme``: of
    the quantised graphs; empty: the main ones.
    """

    crossed: Sequence[int] = ()
    positions: int = 0
    scheme: str = ""

    def find_graph(self, file: Path) -> Path:
        """The scheme's graph beside the main one in ``file``."""
        return name_quantized_file(file, self.scheme) if self.scheme else file


@dataclass(frozen=True)
class Traced:
    """A program to write as ONNX.

    ``names``: of its inputs, in order; a cache's come last and start with ``CACHE``. ``axes``: of inputs whose axes the
    form does not name. ``outputs``: names, if they are not the form's. ``about``: entries of its own for the metadata.
    ``padding``: what the metadata say of padding: nothing if it changes outputs; None: the graphs need no promise.
    """

    program: Program
    names: Sequence[str]
    axes: Mapping[str, Axes] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    about: Mapping[str, str] = field(default_factory=dict)
    padding: Mapping[str, str] | None = None

    def run(self, executor: Executor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The first output. ``inputs`` that it does not have are ignored; a cache that they lack is empty."""
        return self.run_all(executor, inputs)[0]

    def run_all(self, executor: Executor, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Every output."""
        # An empty cache has no positions, and the sizes of the traced one.
        rows = len(next(iter(inputs.values())))
        caches = {name: x for name, x in self.traced.items() if name.startswith(CACHE)}
        shapes = {name: (rows, int(x.shape[1]), 0, int(x.shape[3])) for name, x in caches.items()}
        empty = {name: torch.zeros(shape, dtype=caches[name].dtype) for name, shape in shapes.items()}
        given = {**empty, **inputs}
        found = next(executor.run_programs([self.program], [[given[name] for name in self.names]]))
        return found if isinstance(found, tuple | list) else [found]

    @property
    def traced(self) -> dict[str, Tensor]:
        """The inputs as they were traced, without numbers."""
        values = {node.name: node.meta["val"] for node in self.program.list_placeholders()}
        return {name: values[node] for name, node in zip(self.names, self.program.user_inputs, strict=True)}

    @property
    def ranks(self) -> dict[str, int]:
        """How many dimensions each input has."""
        return {name: x.ndim for name, x in self.traced.items()}

    def check_sizes(self) -> None:
        """Raise MptkError if the program runs on one number of samples or tokens only."""
        for name, x in self.traced.items():
            # A size that the trace has fixed is a number; an open one is a symbol.
            axes = x.shape[: 2 if is_tokens(x) else 1]
            if fixed := [size for size in axes if str(size).isdigit()]:
                raise TargetError(
                    f"the trace of this model runs only on {name} with {fixed[0]} rows or columns", name=name
                )


@dataclass(frozen=True)
class Part:
    """A graph of several that are traced, cut and emitted as one program.

    ``reads``: name in the whole graph → name in this one; what the whole lacks is left out. ``gives``: its outputs. The
    last part also takes the caches, and gives them after the form's outputs.
    """

    file: str
    reads: Mapping[str, str] = field(default_factory=dict)
    gives: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphCase:
    """A way in which the proof runs the graphs; ``stage``: its name.

    ``run``: opened graphs, their use and samples → outputs as in ``StageOutputs``. ``promise``: a key that the graphs'
    metadata must have; without it the case is left out. ``takes``: whether the graphs run on samples of other kinds; if
    it is given, the case only runs these (``Checks.further``).
    """

    stage: str
    run: Callable[[Any, Use, Samples], Tensor | Sequence[Tensor] | Placed]
    promise: str = ""
    takes: Callable[[Any, Samples], bool] | None = None


def draw_nothing(samples: Samples, seed: str, longer: bool) -> Iterable[Samples]:
    """No further batches."""
    return ()


@dataclass(frozen=True, eq=False)
class OnnxForm:
    """How a kind of model is written as ONNX, and how its graphs are proved.

    Args:
        trace: the dense model, and samples if there are any → the program to write. It raises MptkError if this model
            cannot be written.
        open: the file of the main graph and a device → the graphs in ONNX Runtime, with ``half`` (whether they compute
            in float16), ``metadata`` and ``providers``.
        cases: of the proof. The first gives the outputs of whole samples.
        judge: a scheme, and pairs of outputs of its graph and of the float graph → what quantising changes.
        outputs: names, without the caches. Values ``between`` parts come after them in the traced program.
        axes: of inputs, by name. An input with another number of axes gets made names.
        other_axes: of all other inputs.
        parts: the graphs in the order in which they run, the main one last.
        between: values at which the graph is divided. They are no outputs while the plan cuts, since outputs keep their
            channels.
        draw: the proof's short batch, a seed, and whether the program takes any length → what is also proven: other
            sizes and values. Nothing if the cases run other sizes by themselves.
        explain_unfit: opened graphs and settings → why the graphs are not what the settings ask for, or None.
        float_only: what an error calls the kind, if its main graphs are only written in float32.
        described: file beside the graphs' folder → what writes it, so that programs find the main graph. Such a file is
            optional: a model may be none that the programs know.
    """

    trace: Callable[[Dense, Samples | None], Traced]
    open: Callable[[Path, torch.device], Any]
    cases: tuple[GraphCase, ...]
    judge: Callable[[str, Sequence[tuple[Tensor, Tensor]]], Difference]
    outputs: tuple[str, ...] = ()
    axes: Mapping[str, Axes] = field(default_factory=dict)
    other_axes: Axes = ("batch_size",)
    parts: tuple[Part, ...] = (Part(ONNX_FILE),)
    between: tuple[str, ...] = ()
    draw: Callable[[Samples, str, bool], Iterable[Samples]] = draw_nothing
    explain_unfit: Callable[[Any, Settings], str | None] | None = None
    float_only: str = ""
    described: Mapping[str, Callable[[PreTrainedConfig, GenerationConfig | None, Path, str], None]] = field(
        default_factory=dict
    )

    @property
    def graphs(self) -> tuple[str, ...]:
        """The files of the float graphs, the main one first."""
        return tuple(part.file for part in reversed(self.parts))
