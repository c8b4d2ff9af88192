"""structure: whether two ONNX graphs are the same, node for node, whatever their nodes and values are called.

Each node has a digest of its operator, its attributes and the digests of what it reads, so two nodes have one digest
only if everything before them is the same. Constants enter by their numbers if these are sizes, indices or scalars,
else by name, type and shape: numbers of weights may differ by rounding, and are compared by ``compare_constants``.

A graph that is wrong only for one length, batch or token differs from the right one in a node, a constant or an entry
of the metadata. No run has to meet that length to find it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mptk.plain import hash_text
from passes.targets.onnx.tensors import Array, get_constant_tensor, read_tensor_shape, slice_in_parts

EXACT_TYPES = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
"""Types of sizes and indices."""
STEPS_APART = 8
"""How many units in the last place a weight may be away: another processor may round a folded scale otherwise."""

Digests = dict[str, str]
"""Digest → what it is of, in words."""


def compare_structures(found: ir.Model, expected: ir.Model, unlike: Collection[str] = ()) -> str:
    """The first difference of two graphs, in words; "" if there is none. Both are sorted.

    ``unlike``: entries of the metadata that may differ.
    """
    # Nodes are compared as a multiset: two graphs in another order of nodes are the same.
    for model in (found, expected):
        model.graph.sort()
    one, other = describe_model(found, unlike), describe_model(expected, unlike)
    # A digest covers all that its node reads, so one wrong node changes every digest behind it. The first one in the
    # sorted graph is the cause.
    names = dict([*other, *one])
    more, less = Counter(digest for digest, _ in one), Counter(digest for digest, _ in other)
    for counts, words in ((more - less, "it has {}, which mptk does not write"), (less - more, "it lacks {}")):
        if counts:
            first = next(digest for digest in names if digest in counts)
            return words.format(names[first])
    return ""


def describe_model(model: ir.Model, unlike: Collection[str] = ()) -> list[tuple[str, str]]:
    """The digest of each part of a model, and the part in words; a node comes after what it reads."""
    # Everything that a runtime acts on, before the graph itself.
    said = {name: text for name, text in model.metadata_props.items() if name not in unlike}
    found = [_hash_words(f"the entry {name}={text} of its metadata") for name, text in sorted(said.items())]
    found += [
        _hash_words(f"version {version} of the operators {name!r}") for name, version in model.opset_imports.items()
    ]
    found += [_hash_words(f"the function {name}") for name in model.functions]
    return found + _describe_graph(model.graph, {})


def _describe_graph(graph: ir.Graph, known: Mapping[ir.Value, str]) -> list[tuple[str, str]]:
    """The parts of a graph. ``known``: digests of values of the graphs around it, which a branch may read."""
    values, found = dict(known), list[tuple[str, str]]()
    for place, value in enumerate(graph.inputs):
        found.append(_hash_words(f"the input {place} {_describe_value(value)}"))
        values[value] = found[-1][0]
    for value in graph.initializers.values():
        found.append(_hash_words(f"the constant {_describe_constant(value)}"))
        values[value] = found[-1][0]
    for node in graph:
        read = [values[value] if value is not None else "" for value in node.inputs]
        said = [f"{name}: {_describe_attribute(each, values)}" for name, each in sorted(node.attributes.items())]
        digest = _hash_texts(node.domain, node.op_type, node.overload, *said, "reads", *read, str(len(node.outputs)))
        # The result's name is only for the message.
        found.append((digest, f"the node {node.op_type} that makes {node.outputs[0].name}"))
        values |= {value: _hash_texts(digest, str(index)) for index, value in enumerate(node.outputs)}
    for place, value in enumerate(graph.outputs):
        digest = _hash_texts("output", str(place), _describe_value(value), values[value])
        found.append((digest, f"the output {place} {_describe_value(value)}, made otherwise"))
    return found


def _hash_words(words: str) -> tuple[str, str]:
    return _hash_texts(words), words


def _hash_texts(*texts: str) -> str:
    return hash_text("\0".join(texts))


def _describe_value(value: ir.Value) -> str:
    """Name, type and sizes. A size without a name is one that no program sets."""
    sizes = None if value.shape is None else [str(size) for size in value.shape]
    return f"{value.name}, {value.dtype} {sizes}"


def _describe_constant(value: ir.Value) -> str:
    """A constant, by its numbers if they are exact, else by its name."""
    tensor = get_constant_tensor(value)
    kind = f"{tensor.dtype} {list(read_tensor_shape(tensor))}"
    if tensor.dtype in EXACT_TYPES or tensor.size <= 1:
        return f"{kind} of {_describe_numbers(tensor)}"
    return f"{value.name}, {kind}"


def _describe_numbers(tensor: ir.TensorProtocol) -> str:
    if tensor.dtype is ir.DataType.STRING:
        return repr(tensor.numpy().tolist())
    # A few numbers are shown in the message, more as a digest.
    numbers = np.ascontiguousarray(tensor.numpy())
    return repr(numbers.tolist()) if numbers.size <= 8 else _hash_texts(numbers.tobytes().hex())


def _describe_attribute(attribute: ir.Attr, values: Mapping[ir.Value, str]) -> str:
    if attribute.type is ir.AttributeType.GRAPH:
        return _hash_texts(*(digest for digest, _ in _describe_graph(attribute.as_graph(), values)))
    if attribute.type is ir.AttributeType.GRAPHS:
        return _hash_texts(*(digest for each in attribute.as_graphs() for digest, _ in _describe_graph(each, values)))
    if attribute.type is ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{tensor.dtype} {list(read_tensor_shape(tensor))} {_describe_numbers(tensor)}"
    return f"{attribute.type} {attribute.value!r}"


def compare_constants(found: ir.Model, expected: ir.Model) -> str:
    """The first constant whose numbers differ by more than rounding, and its row; "" if there is none.

    Constants that only one of the graphs has are the structure's.
    """
    for name, value in expected.graph.initializers.items():
        other = found.graph.initializers.get(name)
        if other is None or read_tensor_shape(get_constant_tensor(other)) != read_tensor_shape(
            get_constant_tensor(value)
        ):
            continue
        if (
            row := find_differing_row(get_constant_tensor(other).numpy(), get_constant_tensor(value).numpy())
        ) is not None:
            return f"row {row} of the constant {name} differs"
    return ""


def find_differing_row(found: Array, expected: Array) -> int | None:
    """The first row in which two arrays of one shape differ by more than rounding; None if there is none."""
    flat = found.reshape(len(found), -1) if found.ndim else found.reshape(1, 1)
    other = expected.reshape(flat.shape)
    for rows in slice_in_parts(flat.shape) if flat.size else ():
        if flat[rows].tobytes() == other[rows].tobytes():  # mostly, and much faster than to compare numbers
            continue
        wrong = np.flatnonzero(_mark_differences(flat[rows], other[rows]).any(axis=1))
        if len(wrong):
            return int(rows.start) + int(wrong[0])
    return None


def _mark_differences(found: Array, expected: Array) -> Array:
    """Where two arrays differ by more than rounding. NaN differs from all but NaN."""
    if not np.issubdtype(expected.dtype, np.floating):
        return np.asarray(found != expected)
    one, other = found.astype(np.float64), expected.astype(np.float64)
    allowed = STEPS_APART * float(np.finfo(expected.dtype).eps) * np.abs(other)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    return np.asarray(~(np.abs(one - other) <= allowed) & ~same)


def compare_with_weights(model: ir.Model, weights: Iterable[tuple[str, Array]]) -> str:
    """The first row of a table in the graph that is not the weight's, if other rows of it are; "" if there is none.

    A table of tokens or positions is read only in the rows that samples need, so a run does not show the others; every
    row of another matrix is part of every result. A table of which no row is a weight's was computed from one, so that
    the rows that samples read show it.

    ``weights``: matrices by name, float32.
    """
    # The graph's tables.
    read = [node.inputs[0] for node in model.graph if node.op_type == "Gather"]
    held = {str(v.name): v.const_value for v in read if v is not None and v.const_value is not None}
    matrices = {
        n: t for n, t in held.items() if t.dtype is ir.DataType.FLOAT and len(read_tensor_shape(t)) == 2 and t.size
    }
    # A print for each row of each weight of a table's shape, also of its transpose. The weights themselves would be too
    # large to keep.
    sizes = {read_tensor_shape(t) for t in matrices.values()}
    known: dict[tuple[int, ...], dict[str, Prints]] = {}
    for name, weight in weights:
        rows, columns = weight.shape
        for shape, axis in (((rows, columns), 0), ((columns, rows), 1)):
            if shape in sizes:
                known.setdefault(shape, {})[name] = compute_prints(weight, axis)
    for name, tensor in matrices.items():
        found, alike = compute_prints(tensor.numpy(), 0), known.get(read_tensor_shape(tensor), {})
        # The table's weight is the one with which it shares most rows. Rows of zeros are in many tables.
        same = {weight: int(((found == other) & (found != 0)).sum()) for weight, other in alike.items()}
        if any(np.array_equal(found, other) for other in alike.values()) or not any(same.values()):
            continue
        likeliest = max(same, key=same.__getitem__)
        wrong = int(np.flatnonzero(found != alike[likeliest])[0])
        return f"row {wrong} of the constant {name} is not the one of {likeliest}"
    return ""


Prints = npt.NDArray[np.uint32]
"""A number for each row; 0 for a row of zeros."""


def compute_prints(matrix: Array, axis: int) -> Prints:
    """A number for each row, or each column if ``axis`` is 1, of a float32 matrix; equal rows have equal ones.

    It is a sum of the row's bits times random odd factors, modulo 2³². An odd factor loses no bit, and a sum can be
    taken part by part along either axis.
    """
    counts = matrix.shape[1 - axis]
    factors = np.random.default_rng(counts).integers(1, 1 << 32, counts, np.uint32) | np.uint32(1)
    bits = np.ascontiguousarray(matrix, np.float32).view(np.uint32)
    if axis:
        return _sum(bits[rows] * factors[rows, None] for rows in slice_in_parts(bits.shape))
    return np.concatenate([(bits[rows] * factors).sum(axis=1, dtype=np.uint32) for rows in slice_in_parts(bits.shape)])


def _sum(products: Iterable[Prints]) -> Prints:
    whole: Prints = np.add.reduce([each.sum(axis=0, dtype=np.uint32) for each in products], axis=0, dtype=np.uint32)
    return whole
