"""archive: a cut program as ``model.pt2``, which plain torch opens without mptk and without the model's class.

It is a ``torch.export`` archive of the graph and its constants. The weights are only in ``model.safetensors``: in the
place of each the archive has one NaN, so ``load_state_dict(…, assign=True)`` must give them. What a graph does not
say of its program (names of inputs, tied names, conditions on sizes) is in it as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind

from mptk.compat.torch import build_exported, hide_exporter_logs
from mptk.errors import MptkError, TargetError, take_first_line
from mptk.files import format_json, make_scratch
from mptk.io import EXTRA, read_archive
from mptk.ir import (
    CallSizes,
    Condition,
    Container,
    Limits,
    Program,
    Weights,
    assert_sizes,
    list_symbolic_sizes,
    remove_state_copies,
    take_assertions,
    write_size_functions,
)
from mptk.reading import Damaged, make_damage_error, make_typed, parse_json
from passes.frontend.trace import copy_written_state

ARCHIVE = "model.pt2"
"""torch.export's own ending."""


@dataclass(frozen=True)
class Beside:
    """What a graph does not say of its program, as JSON. Fields as of ``Program`` and ``Limits``.

    ``condition_lines``: the source line of each condition that the graph asserts, in order.
    """

    inputs: list[str]
    aliases: dict[str, str]
    frozen: list[str]
    condition_lines: list[str]
    lines: list[tuple[str, int, str]]
    several: list[str]
    note: str
    contiguous: bool
    gradients: Literal["", "off", "inputs"]
    trains: str
    outputs: object
    positional: int | None


def list_saved(program: Program) -> list[str]:
    """The names in ``state`` of parameters and persistent buffers. The others are constants of the graph."""
    # In the order of ``state``, which is the module's.
    kinds = ((spec.kind, spec.persistent, program.weights.get(spec.arg.name)) for spec in program.signature.input_specs)
    saved = {name for kind, kept, name in kinds if kind is InputKind.PARAMETER or (kind is InputKind.BUFFER and kept)}
    return [name for name in program.state if name in saved]


def write_archive(file: Path, program: Program) -> None:
    """Write a program's graph and constants. Raises MptkError if torch cannot write one of its calls."""
    # The graph states its conditions on sizes itself, since plain torch asks nobody else.
    graph, signature = _merge_tied(program)
    write_size_functions(graph.graph)
    assert_sizes(graph.graph, program.sizes)
    graph.recompile()
    # Blanks in place of weights; constants as they are.
    kinds = {spec.target: spec.kind for spec in signature.input_specs}
    saved = list_saved(program)
    state = {name: _make_blank(program.state.find_like(name)) for name in saved}
    for name in saved:
        if kinds[name] is InputKind.PARAMETER:
            state[name] = nn.Parameter(state[name], requires_grad=name not in program.frozen)
    constants = {name: program.state[name].contiguous() for name in program.state if name not in state}
    for node in graph.graph.nodes:
        node.meta = {"val": node.meta["val"]} if "val" in node.meta else {}  # no paths of this machine
    # Written with what the graph does not say, in an entry of its own.
    found = build_exported(program.exported, graph, signature, state=state, constants=constants, example_inputs=None)
    try:
        with hide_exporter_logs("torch.export"):
            torch.export.save(found, file, extra_files={EXTRA: format_json(asdict(_describe_program(program)))})
    except Exception as error:  # torch's writer has no base class of errors
        raise TargetError(
            f"torch.export cannot write the graph ({take_first_line(error)}); open it in this process",
            name="torch.export",
        ) from error


def _describe_program(program: Program) -> Beside:
    limits = program.limits
    return Beside(
        list(program.inputs),
        dict(program.aliases),
        sorted(program.frozen),
        [condition.line for condition in limits.conditions],
        [(name, dim, line) for (name, dim), line in limits.lines.items()],
        sorted(limits.several),
        limits.note,
        limits.contiguous,
        limits.gradients,
        limits.trains,
        None if program.outputs is None else program.outputs.to_json(),
        program.positional,
    )


def _merge_tied(program: Program) -> tuple[fx.GraphModule, ExportGraphSignature]:
    """The graph with one input for each weight, and no copies of state. ``Beside`` has the other names of tied ones."""
    graph, gone = remove_state_copies(program.copy_graph()), set[str]()
    first: dict[str, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op == "placeholder" and node.name in program.weights:
            own = first.setdefault(program.weights[node.name], node)
            if own is not node:
                node.replace_all_uses_with(own)
                graph.graph.erase_node(node)
                gone.add(node.name)
    graph.recompile()
    kept = (spec for spec in program.signature.input_specs if spec.arg.name not in gone)
    specs = [replace(spec, target=program.weights.get(spec.arg.name, spec.target)) for spec in kept]
    return graph, replace(program.signature, input_specs=specs)


def _make_blank(like: Tensor) -> Tensor:
    """A tensor that takes the memory of one number: NaN, so that nobody takes it for a weight."""
    value = float("nan") if like.is_floating_point() or like.is_complex() else 0
    return torch.full((1,), value, dtype=like.dtype).as_strided(like.shape, [0] * like.ndim)


def check_archive(program: Program) -> None:
    """Write a program's graph and read it back. Raises MptkError if a call or a condition on sizes gets lost."""
    with make_scratch() as place:
        file = place.folder / ARCHIVE
        write_archive(file, program)
        try:
            open_archive(file, program.state)
        except MptkError as error:
            raise TargetError(
                f"mptk cannot read the graph that torch.export writes of this module ({take_first_line(error)}); "
                "write what "
                "depends on sizes with tensors (docs/tracing.md)",
                name="torch.export",
            ) from error


def open_archive(file: Path, weights: Weights) -> Program:
    """The program of an archive with ``weights``, each cast to its type in the graph.

    Raises:
        MptkError: the archive is missing or damaged, holds what could run code, or its weights are others.
    """
    # 1. What the graph does not say, checked against the types of ``Beside``.
    exported, text = read_archive(file)
    said = make_damage_error(file)
    try:
        beside = make_typed(Beside, parse_json(text, said))
    except ValueError as error:
        raise said(str(error)) from error
    # 2. The weights, for the archive's blanks.
    graph, signature = exported.graph_module, exported.graph_signature
    likes = exported.state_dict
    for name, like in likes.items():
        if name not in weights or weights.find_like(name).shape != like.shape:
            raise said(f"{name} is missing beside it, or of another shape")
    kept = weights.select_names({name: name for name in likes})
    state = kept.with_edits({name: partial(Tensor.to, dtype=like.dtype) for name, like in likes.items()})
    # 3. The conditions on sizes, out of the graph: the passes know them only as limits of a program.
    conditions = take_assertions(graph.graph, _find_sizes(exported))
    copy_written_state(graph.graph, {spec.arg.name for spec in signature.input_specs if spec.target is not None})
    graph.recompile()
    return Program(
        graph,
        signature,
        state.with_entries(exported.constants),
        beside.aliases,
        exported,
        tuple(beside.inputs),
        _read_limits(beside, conditions, said),
        frozenset(beside.frozen),
        outputs=_read_outputs(beside, said),
        positional=beside.positional,
    )


def _read_outputs(beside: Beside, said: Damaged) -> Container | None:
    try:
        return None if beside.outputs is None else Container.from_json(beside.outputs)
    except ValueError as error:
        raise said(str(error)) from error


def _find_sizes(exported: ExportedProgram) -> CallSizes:
    """The sizes of an export's inputs."""
    user = set(exported.graph_signature.user_inputs)
    nodes = [n for n in exported.graph.find_nodes(op="placeholder") if n.name in user]
    found = tuple((n.name, list_symbolic_sizes(n.meta["val"])) for n in nodes if isinstance(n.meta["val"], Tensor))
    return CallSizes(found, tuple(name for name, _ in found), Limits())


def _read_limits(beside: Beside, conditions: Sequence[sympy.Basic], said: Damaged) -> Limits:
    """What the graph asserts, with what is known of it. Assertions of sizes above 1 come last."""
    count = len(beside.condition_lines)
    if len(conditions) != count + len(beside.several):
        raise said(f"it asserts {len(conditions)} conditions on sizes, and {EXTRA} tells of {count}")
    return Limits(
        tuple(Condition(holds, line) for holds, line in zip(conditions, beside.condition_lines, strict=False)),
        {(name, dim): line for name, dim, line in beside.lines},
        frozenset(beside.several),
        beside.note,
        beside.contiguous,
        beside.gradients,
        beside.trains,
    )
