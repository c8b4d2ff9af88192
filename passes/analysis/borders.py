"""borders: find the positions at which a decoder changes its computation, so that a proof can cross them.

A sliding window of 512 has an effect only from position 512 on; a rotary embedding may change its base there. No model
is known by name. Borders come from

- the config: integers of fields whose name contains window, chunk, local attention or the original number of
  positions, also in nested configs and ``rope_parameters``, and ``max_position_embeddings`` if a rope type is dynamic;
- the graph: integers with which positions are compared, or by which they are shifted or divided. Positions are
  integer and boolean tensors that depend on no parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, fx
from torch.export.graph_signature import InputKind
from transformers import PreTrainedConfig

from mptk.ir import Program, name_base_op

MARGIN = 8
"""Positions that a proof needs beyond a border: a few steps after it, and a few in case the border is inexact."""
_BORDER_FIELDS = re.compile(r"window|chunk|local_attention|original_max_position_embeddings")
_LIMITS = re.compile(r"^max_(\w+_)?position|^n_positions$")
"""Fields with the number of positions: ``max_position_embeddings``, Whisper's ``max_target_positions``, GPT-2's."""
_POSITIONS = "max_position_embeddings"
_COMPARED = {"sub", "rsub", "add", "floor_divide", "div", "remainder", "fmod", "lt", "le", "gt", "ge", "clamp"}
_MADE = {"full", "scalar_tensor"}
"""Ops that fill a tensor with one number."""
_CARRYING = {"lift_fresh_copy", "detach_", "detach", "to", "_to_copy", "clone", "expand", "unsqueeze"}


@dataclass(frozen=True)
class Reach:
    """The length of a proof.

    Attributes:
        borders: the borders that it crosses, ascending.
        beyond: the borders that are too far for it, ascending.
        length: tokens of its longest sequence, which crosses all of ``borders``; 0: no sequence.
    """

    borders: tuple[int, ...]
    beyond: tuple[int, ...]
    length: int

    @property
    def note(self) -> str:
        """The borders left out and the option that covers them; empty if none is left out."""
        if not self.beyond:
            return ""
        places = ", ".join(map(str, self.beyond))
        return (
            f"the proof stops before position {places}, at which this model has a window or threshold; "
            f"--proof-length {self.beyond[-1] + MARGIN} covers it"
        )


def reach(program: Program, *configs: PreTrainedConfig, bound: int, least: int = 0) -> Reach:
    """The borders of a program and of its configs: the dense model's, and the one written for the pruned model.

    ``bound``: the longest sequence of a proof, in tokens. The model's own number of positions is a bound, too, unless
    its rope type allows more. ``least``: the tokens of a proof without borders, if these bounds allow them.
    """
    # 0 and 1 are in every graph (x − 1), and each proof crosses them.
    found = set(find_graph_borders(program)).union(*(find_config_borders(config.to_dict()) for config in configs))
    longest = min((n for config in configs for n in _find_position_limits(config)), default=None)
    usable = sorted(b for b in found if b > 1 and (longest is None or b + MARGIN <= longest))
    crossed = tuple(b for b in usable if b + MARGIN <= bound)
    plain = min(least, bound, least if longest is None else longest - MARGIN)
    return Reach(
        crossed,
        tuple(b for b in usable if b + MARGIN > bound),
        max(plain, 0, *(border + MARGIN for border in crossed)),
    )


def find_config_borders(config: Mapping[str, object]) -> Iterator[int]:
    """Borders in a config."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from find_config_borders(value)
        elif _BORDER_FIELDS.search(str(key)):
            values = value if isinstance(value, list | tuple) else [value]
            yield from (v for v in values if type(v) is int and v > 0)
    positions = config.get(_POSITIONS)
    if type(positions) is int and _has_dynamic_rope(config):
        yield positions


def find_graph_borders(program: Program) -> Iterator[int]:
    """Integers in the graph with which positions are compared, or by which they are shifted or divided."""
    parameters = {s.arg.name for s in program.signature.input_specs if s.kind is InputKind.PARAMETER}
    numbers = _find_integers(program)
    learned: set[fx.Node] = set()
    for node in program.graph.graph.nodes:
        # What depends on a parameter is not a position. The walk is in the graph's order, so inputs are known.
        if node.name in parameters or any(n in learned for n in node.all_input_nodes):
            learned.add(node)
        elif (
            node.op == "call_function"
            and name_base_op(node.target) in _COMPARED
            and any(map(_is_integral, node.all_input_nodes))
        ):
            for argument in (*node.args, *node.kwargs.values()):
                value = numbers.get(argument) if isinstance(argument, fx.Node) else argument
                if type(value) is int:  # ``isinstance`` would take True for 1
                    yield abs(value)


def _find_integers(program: Program) -> dict[fx.Node, int]:
    """Node → its value, if it is one integer: a constant of the model, or a tensor filled with one."""
    found: dict[fx.Node, int] = {}
    weights = program.weights
    for node in program.graph.graph.nodes:
        if node.op == "placeholder" and node.name in weights and program.has_values:
            like = program.state.find_like(weights[node.name])
            if like.numel() == 1 and not like.is_floating_point() and not like.is_complex():
                found[node] = int(program.state[weights[node.name]].item())
        elif node.op == "call_function" and name_base_op(node.target) in _MADE:
            found.update((node, a) for a in node.args if type(a) is int)
        elif (
            len(node.all_input_nodes) == 1
            and node.all_input_nodes[0] in found
            and name_base_op(node.target) in _CARRYING
        ):
            found[node] = found[node.all_input_nodes[0]]
    return found


def _is_integral(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.dtype.is_floating_point and not value.dtype.is_complex


def _has_dynamic_rope(config: Mapping[str, object]) -> bool:
    """Whether a rope type of this config depends on the number of positions."""
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    # Some models have a rope for each kind of layer. Older configs write ``type`` for ``rope_type``.
    kinds = [rope, *rope.values()] if isinstance(rope, Mapping) else []
    return any(isinstance(k, Mapping) and "dynamic" in str(k.get("rope_type", k.get("type"))) for k in kinds)


def _find_position_limits(config: PreTrainedConfig) -> Iterator[int]:
    """The numbers of positions in a model's config, unless its rope type allows more."""
    own = config.get_text_config()
    if _has_dynamic_rope(own.to_dict()):
        return
    # Others are not read: some configs raise an error for what differs from layer to layer.
    names = dict.fromkeys(name for name in (_POSITIONS, *own.to_dict()) if _LIMITS.search(name))
    yield from (n for name in names if type(n := getattr(own, name, None)) is int and n > 0)
