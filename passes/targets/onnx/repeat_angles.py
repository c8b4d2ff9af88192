"""repeat_angles: repeat rotary angles for each row, if all rows share them.

The fusion of rotary embedding takes angles [1, sequence, dim / 2] as they are. ONNX Runtime's RotaryEmbedding wants as
many rows as its input has: [batch, sequence, dim / 2].
"""

from __future__ import annotations

import onnx_ir as ir


class RepeatAnglesPass(ir.passes.InPlacePass):
    """Repeat the cosines and sines of RotaryEmbedding for each row. Uses the shapes of its inputs."""

    def ensures(self, model: ir.Model) -> None:
        """No node's angles have one row if its input may have more."""
        if left := [node.name for node in model.graph if _has_shared_angles(node)]:
            raise ir.passes.PostconditionError(f"{left[0]} has the angles of one row")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        made: dict[tuple[ir.Value, object], ir.Value] = {}
        for node in [node for node in model.graph if _has_shared_angles(node)]:
            turned = node.inputs[0]
            assert turned is not None
            for place in (1, 2):
                waves = node.inputs[place]
                assert waves is not None
                key = waves, _find_row_size(turned) or turned
                if key not in made:
                    steps = ir.tape.Tape()
                    made[key] = _repeat_rows(steps, waves, turned)
                    model.graph.insert_before(node, steps.nodes)
                node.replace_input_with(place, made[key])
        return ir.passes.PassResult(model, bool(made))


def _has_shared_angles(node: ir.Node) -> bool:
    """Whether a RotaryEmbedding has angles of one row for an input of more."""
    if node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) > 3:  # a fourth input looks angles up
        return False
    return _find_row_size(_find_angles(node.inputs[1])) == 1 != _find_row_size(node.inputs[0])


def _find_row_size(value: ir.Value | None) -> object:
    """The size of the first axis, a number or its name; None if it is not known."""
    if value is None or value.shape is None:
        return None
    size = value.shape[0]
    return size if isinstance(size, int) else size.value


def _find_angles(cosines: ir.Value | None) -> ir.Value | None:
    """The value whose cosines, or sines, ``cosines`` are; the fusion gives these no shape."""
    made_by = None if cosines is None else cosines.producer()
    return made_by.inputs[0] if made_by is not None and made_by.op_type in ("Cos", "Sin") else cosines


def _repeat_rows(steps: ir.tape.Tape, waves: ir.Value, turned: ir.Value) -> ir.Value:
    """``waves`` [1, sequence, n] as [batch of ``turned``, sequence, n]."""
    batch = steps.op("Shape", [turned], {"start": 0, "end": 1})
    ones = steps.op("Constant", [], {"value_ints": [1, 1]})
    shape = steps.op("Concat", [batch, ones], {"axis": 0})
    return steps.op("Expand", [waves, shape])
