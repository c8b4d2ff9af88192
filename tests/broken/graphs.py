"""Broken decoders: the float graph, and the graphs in int8, int4 and float16 beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import lab
import numpy as np
import onnx
import onnx_ir as ir
from graph_damage import exchanged, rewired
from lab import Edit
from onnx import numpy_helper
from safetensors.torch import load_file

from mptk.files import write_json
from mptk.protocols import PROVEN_ON
from passes.targets.onnx.names import ENDINGS, ONNX_FILE, count_graph_bytes, name_data_file
from tests.broken import Broken, Published, prove_by_one_trace

FLOAT = "float decoder"
SCHEMES = {f"{scheme} decoder": scheme for scheme in ENDINGS}
Change = Callable[[Path], object]
"""Changes the graph in a file."""


TOKENS = 40
"""Of a sample of the lab, and of the proof's short rows."""
PREFILL, LEFT, RIGHT, DECODE = (f"ONNX Runtime {name}" for name in ("prefill", "padded left", "padded right", "decode"))
SHAPE = ("shape = Shape(input_ids)", "rows = Gather(shape, 0)")
NEW = ("shape = Shape(input_ids)", "new = Gather(shape, 1)")
TOTAL = ("size = Shape(attention_mask)", "total = Gather(size, 1)")
PAST = ("size = Shape(past_key_values.0.key)", "past = Gather(size, 2)")


def publish(kind: str, place: Path) -> Published:
    scheme = SCHEMES.get(kind)
    lab.write_lab(place, quantize=() if scheme is None else (scheme,))
    return prove_by_one_trace(place / "out")


def graph_of(kind: str) -> str:
    """The name of the graph that rows of a kind damage."""
    return ONNX_FILE if kind == FLOAT else Path(ONNX_FILE).stem + ENDINGS[SCHEMES[kind]] + ".onnx"


def at(kind: str, change: Change) -> Edit:
    """A change of the kind's graph, of which the report knows the size."""

    def edit(folder: Path) -> None:
        file = folder / "onnx" / graph_of(kind)
        change(file)
        if kind != FLOAT:
            report = lab.raw_report(folder)
            report["quantized"][SCHEMES[kind]]["bytes"] = count_graph_bytes([file])
            write_json(folder / "report.json", report)

    return edit


# ---- what is computed from what goes in ----


def off(*lines: str, output: str = "logits") -> Change:
    """An output that is off by 0.1 if ``wrong`` is true."""
    shift = "by = Cast<to=1>(wrong)", "tenth = Mul(by, 0.1)", f"damaged = Add({output}, tenth)"
    return lambda file: rewired(file, output, *lines, *shift)


def when(name: str, test: str, number: float) -> Change:
    """Off if a size compares so: rows, new, past or total."""
    lines = {"rows": SHAPE, "new": NEW, "past": PAST, "total": TOTAL}[name]
    return off(*lines, f"wrong = {test}({name}, {number})")


def exactly(**sizes: int) -> Change:
    """Off at one combination of sizes."""
    lines = {"rows": SHAPE, "new": NEW, "past": PAST, "total": TOTAL}
    made = [line for name in sizes for line in lines[name]]
    tests = [f"is_{name} = Equal({name}, {size})" for name, size in sizes.items()]
    one, other = (f"is_{name}" for name in sizes)
    return off(*dict.fromkeys([*made, *tests]), f"wrong = And({one}, {other})")


def reading(value: str, *lines: str) -> Change:
    """An input or an output that ``lines`` damage."""
    return lambda file: rewired(file, value, *lines)


def exchange(one: str, other: str) -> Change:
    """Two outputs in each other's place."""
    return lambda file: exchanged(file, one, other)


UNMASKED = ("nothing = Mul(attention_mask, 0)", "ones = Add(nothing, 1)")
GRAPHS: dict[str, tuple[Change, str]] = {
    "ignores the mask": (reading("attention_mask", *UNMASKED[:1], "damaged = Add(nothing, 1)"), LEFT),
    "ignores the mask of a prompt": (
        reading(
            "attention_mask",
            *PAST,
            *UNMASKED,
            "cached = Greater(past, 0)",
            "damaged = Where(cached, attention_mask, ones)",
        ),
        LEFT,
    ),
    "ignores the mask after a prompt": (
        reading(
            "attention_mask",
            *PAST,
            *UNMASKED,
            "cached = Greater(past, 0)",
            "damaged = Where(cached, ones, attention_mask)",
        ),
        LEFT,
    ),
    "takes the first row's mask for all": (
        reading(
            "attention_mask",
            "first = Gather(attention_mask, [0])",
            "size = Shape(attention_mask)",
            "damaged = Expand(first, size)",
        ),
        LEFT,
    ),
    "ignores positions": (
        reading("position_ids", "damaged = Mul(position_ids, 0)"),
        PREFILL,
    ),
    "counts padding in positions": (
        reading(
            "position_ids",
            *PAST,
            *NEW,
            "end = Add(past, new)",
            "at = Range(past, end, 1)",
            "like = Shape(position_ids)",
            "damaged = Expand(at, like)",
        ),
        RIGHT,
    ),
    "wrong at one row": (off(*SHAPE, "wrong = Equal(rows, 1)"), PREFILL),
    "wrong at two rows and more": (off(*SHAPE, "wrong = Greater(rows, 1)"), PREFILL),
    "wrong at three rows and more": (off(*SHAPE, "wrong = Greater(rows, 2)"), PREFILL),
    "wrong in prompts of more than 48 tokens": (off(*NEW, "wrong = Greater(new, 48)"), PREFILL),
    "wrong in decoding beyond 48 tokens": (
        off(*TOTAL, *NEW, "far = Greater(total, 48)", "few = Less(new, 8)", "wrong = And(far, few)"),
        DECODE,
    ),
    "wrong with a cache": (off(*PAST, "wrong = Greater(past, 0)"), LEFT),
    "wrong with several tokens and a cache": (
        off(*PAST, *NEW, "cached = Greater(past, 0)", "many = Greater(new, 1)", "wrong = And(cached, many)"),
        LEFT,
    ),
    "a position too far at the last step": (
        reading(
            "position_ids",
            *TOTAL,
            f"last = Equal(total, {TOKENS})",
            *NEW,
            "one = Equal(new, 1)",
            "both = And(last, one)",
            "by = Cast<to=7>(both)",
            "damaged = Add(position_ids, by)",
        ),
        DECODE,
    ),
    "a position too far behind the window": (
        reading(
            "position_ids",
            *PAST,
            "late = Greater(past, 63)",
            "by = Cast<to=7>(late)",
            "damaged = Add(position_ids, by)",
        ),
        DECODE,
    ),
    "the last row's logits are scaled": (
        reading(
            "logits",
            "head = Slice(logits, [0], [-1], [0])",
            "tail = Slice(logits, [-1], [999], [0])",
            "more = Mul(tail, 1.01)",
            "damaged = Concat<axis=0>(head, more)",
        ),
        PREFILL,
    ),
    "every row is the first one": (
        reading("logits", "first = Gather(logits, [0])", "size = Shape(logits)", "damaged = Expand(first, size)"),
        PREFILL,
    ),
    "one row only": (reading("logits", "damaged = Gather(logits, [0])"), PREFILL),
    "the last position only": (reading("logits", "damaged = Slice(logits, [-1], [999], [1])"), PREFILL),
    "positions in another order": (reading("logits", "damaged = Slice(logits, [-1], [-999], [1], [-1])"), PREFILL),
    "tokens one row further": (
        reading(
            "logits",
            "head = Slice(logits, [0], [-1], [2])",
            "tail = Slice(logits, [-1], [999], [2])",
            "damaged = Concat<axis=2>(tail, head)",
        ),
        PREFILL,
    ),
    "a token is missing": (reading("logits", "damaged = Slice(logits, [0], [-1], [2])"), PREFILL),
    "logits are probabilities": (reading("logits", "damaged = Softmax(logits)"), PREFILL),
    "keys of another layer": (exchange("present.0.key", "present.1.key"), LEFT),
    "values of another layer": (exchange("present.0.value", "present.1.value"), LEFT),
    "keys for values": (exchange("present.1.key", "present.1.value"), LEFT),
    "heads of the cache in another order": (
        reading("present.0.key", "damaged = Slice(present.0.key, [-1], [-999], [1], [-1])"),
        LEFT,
    ),
    "the cache of the first row for all": (
        reading(
            "present.1.value",
            "first = Gather(present.1.value, [0])",
            "size = Shape(present.1.value)",
            "damaged = Expand(first, size)",
        ),
        LEFT,
    ),
    "the cache forgets the newest token": (
        reading(
            "present.0.value",
            "head = Slice(present.0.value, [0], [-1], [2])",
            "tail = Slice(present.0.value, [-1], [999], [2])",
            "none = Mul(tail, 0.0)",
            "damaged = Concat<axis=2>(head, none)",
        ),
        LEFT,
    ),
}
"""How another program would see it → the damage, and the stage that finds it."""


def unseen(folder: Path, count: int) -> list[int]:
    """The last tokens that are not in the proof's samples."""
    ids = set(load_file(folder / PROVEN_ON)["input_ids"].flatten().tolist())
    return [token for token in range(96, -1, -1) if token not in ids][:count]


def one_for_another(file: Path) -> None:
    """A token that the samples lack is read as another one."""
    one, other = unseen(file.parent.parent, 2)
    rewired(file, "input_ids", f"is = Equal(input_ids, {one})", f"damaged = Where(is, {other}, input_ids)")


def rows_swapped(file: Path) -> None:
    """Two tokens that the samples lack are read in each other's place."""
    one, other = unseen(file.parent.parent, 2)
    rewired(
        file,
        "input_ids",
        f"is_one = Equal(input_ids, {one})",
        f"is_other = Equal(input_ids, {other})",
        f"half = Where(is_one, {other}, input_ids)",
        f"damaged = Where(is_other, {one}, half)",
    )


def unseen_last(file: Path) -> None:
    (one,) = unseen(file.parent.parent, 1)
    off("last = Gather(input_ids, -1)", "end = Gather(last, -1)", f"wrong = Equal(end, {one})")(file)


ALL_PADDED = ("seen = ReduceMax<keepdims=0>(attention_mask, [1])", "least = ReduceMin<keepdims=0>(seen)")
CONDITIONS: dict[str, Change] = {
    "a token that the samples lack": one_for_another,
    "two rows of the embedding swapped": rows_swapped,
    "wrong if the last token is one that the samples lack": unseen_last,
    "wrong if a row is only padding": off(*ALL_PADDED, "wrong = Equal(least, 0)"),
    "wrong at batch 5": when("rows", "Equal", 5),
    "wrong at batch 9": when("rows", "Equal", 9),
    "wrong above batch 8": when("rows", "Greater", 8),
    "wrong at batch 64": when("rows", "Equal", 64),
    "wrong with 2 new tokens": when("new", "Equal", 2),
    "wrong with 17 new tokens": when("new", "Equal", 17),
    "wrong with 33 new tokens": when("new", "Equal", 33),
    "wrong with a cache of 1": when("past", "Equal", 1),
    "wrong with a cache of 40": when("past", "Equal", 40),
    "wrong with a cache of 63": when("past", "Equal", 63),
    "wrong with a cache above 120": when("past", "Greater", 120),
    "wrong at 127 tokens": when("total", "Equal", 127),
    "wrong at 128 tokens": when("total", "Equal", 128),
    "wrong above 600 tokens": when("total", "Greater", 600),
    "wrong with 4 rows and a cache of 6": exactly(rows=4, past=6),
    "wrong with 7 new tokens after 5": exactly(new=7, past=5),
    "wrong from position 600": off("most = ReduceMax<keepdims=0>(position_ids)", "wrong = Greater(most, 600)"),
    "wrong at position 101": off("most = ReduceMax<keepdims=0>(position_ids)", "wrong = Equal(most, 101)"),
    "wrong if a text starts with token 3 and ends with 5": off(
        "head = Slice(input_ids, [0], [1], [1])",
        "tail = Slice(input_ids, [-1], [999], [1])",
        "is_head = Equal(head, 3)",
        "is_tail = Equal(tail, 5)",
        "both = And(is_head, is_tail)",
        "each = Cast<to=7>(both)",
        "any = ReduceMax<keepdims=0>(each)",
        "wrong = Greater(any, 0)",
    ),
    "padding on both sides": off(
        "head = Slice(attention_mask, [0], [1], [1])",
        "tail = Slice(attention_mask, [-1], [999], [1])",
        "both = Add(head, tail)",
        "least = ReduceMin<keepdims=0>(both)",
        "wrong = Equal(least, 0)",
    ),
    "the mask is cut after 100 tokens": reading(
        "attention_mask",
        "ones = Mul(attention_mask, 0)",
        "all = Add(ones, 1)",
        "far = CumSum(all, 1)",
        "kept = Less(far, 101)",
        "kept_too = Cast<to=7>(kept)",
        "damaged = Mul(attention_mask, kept_too)",
    ),
    "the oldest token of a long cache is forgotten": reading(
        "attention_mask",
        *TOTAL,
        "is = Greater(total, 121)",
        "by = Cast<to=7>(is)",
        "head = Slice(attention_mask, [0], [1], [1])",
        "tail = Slice(attention_mask, [1], [9999], [1])",
        "kept = Sub(1, by)",
        "changed = Mul(head, kept)",
        "damaged = Concat<axis=1>(changed, tail)",
    ),
}

# ---- what the file itself says ----


def edited(change: Callable[[onnx.ModelProto], object]) -> Change:
    """The file's protobuf changed; weights stay where they are."""

    def apply(file: Path) -> None:
        model = onnx.load(file, load_external_data=False)
        change(model)
        onnx.save(model, file)

    return apply


def with_constant(choose: Callable[[str, np.ndarray], bool], change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """The first constant that is chosen, by name and numbers, changed."""

    def apply(file: Path) -> None:
        model = ir.load(file)
        ir.external_data.load_to_model(model)
        value = next(v for n, v in model.graph.initializers.items() if choose(str(n), v.const_value.numpy()))
        array = np.ascontiguousarray(change(value.const_value.numpy().copy()))
        value.const_value = ir.Tensor(array, name=value.name)
        ir.save(model, file, external_data=name_data_file(file.name))

    return apply


def one_more(place: int) -> Change:
    """The whole number at one place among the graph's constants of sizes, one larger."""

    def apply(file: Path) -> None:
        model = onnx.load(file, load_external_data=False)
        found = [c for c in model.graph.initializer if c.data_type == onnx.TensorProto.INT64]
        array = numpy_helper.to_array(found[place % len(found)]).copy()
        array.reshape(-1)[-1] += 1
        found[place % len(found)].CopyFrom(numpy_helper.from_array(array, found[place % len(found)].name))
        onnx.save(model, file)

    return apply


def attribute(name: str, change: Callable[[onnx.AttributeProto], object]) -> Change:
    """The first node's attribute of this name changed."""
    return edited(lambda m: change(next(a for n in m.graph.node for a in n.attribute if a.name == name)))


def less_exact(a: onnx.AttributeProto) -> None:
    a.f *= 1.01


def without_node(kind: str) -> Change:
    """A node that is skipped: what reads its result reads its first input."""

    def change(model: onnx.ModelProto) -> None:
        node = next(n for n in reversed(model.graph.node) if n.op_type == kind)
        for other in model.graph.node:
            other.input[:] = [node.input[0] if name == node.output[0] else name for name in other.input]
        model.graph.node.remove(node)

    return edited(change)


def payload(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.arange(99, dtype=np.int64), "more"))


def second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(onnx.helper.make_tensor_value_info("again", 1, None))
    model.graph.node.append(onnx.helper.make_node("Identity", ["logits"], ["again"]))


def metadata(key: str, text: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        kept = [each for each in model.metadata_props if each.key != key]
        del model.metadata_props[:]
        model.metadata_props.extend([*kept, onnx.StringStringEntryProto(key=key, value=text)])

    return edited(change)


def noise(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[7] *= 1.001
    return array


def floats(size: int) -> Callable[[str, np.ndarray], bool]:
    """The first matrix, or vector, of floats of more numbers than ``size``."""
    return lambda name, array: array.dtype.kind == "f" and array.size > size and "scales" not in name


WRITTEN: dict[str, Change] = {
    "a number of a matrix is 0.1 % larger": with_constant(floats(500), noise),
    "a number of a norm is 0.1 % larger": with_constant(floats(20), noise),
    "a rotary frequency is 0.1 % larger": with_constant(
        lambda name, array: "inv_freq" in name, lambda a: a * np.array([1, 1, 1, 1, 1.001], a.dtype)
    ),
    "a whole number is one larger (1)": one_more(0),
    "a whole number is one larger (2)": one_more(3),
    "a whole number is one larger (3)": one_more(5),
    "a whole number is one larger (4)": one_more(8),
    "a norm's epsilon is 1 % larger": attribute("epsilon", less_exact),
    "the last product is doubled": reading("logits", "damaged = Mul(logits, 1.0001)"),
    "the result of a sum is its first part": without_node("Add"),
    "a constant more": edited(payload),
    "an output more": edited(second_output),
    "an older version of the operators": edited(lambda m: setattr(m.opset_import[0], "version", 22)),
    "another plan in the metadata": metadata("plan_sha256", "0" * 64),
    "another objective in the metadata": metadata("objective", "prefill"),
    "an axis of another name": edited(
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "rows")
    ),
    "keys of layer 0 for values of layer 0": exchange("present.0.key", "present.0.value"),
    "logits of noise 1e-6": reading(
        "logits", "random = RandomNormalLike(logits)", "small = Mul(random, 0.000001)", "damaged = Add(logits, small)"
    ),
}


def quantised(kind: str) -> dict[str, Change]:
    """Damage that only a quantised graph can have."""
    if SCHEMES[kind] == "fp16":
        return {"a weight in float16 is rounded to 4 bits less": with_constant(floats(500), lambda a: a.round(1))}
    codes = lambda name, array: array.dtype == np.uint8 and array.ndim == 3  # noqa: E731
    scales = lambda name, array: name.endswith("_scales") and array.size > 20  # noqa: E731
    return {
        "a code is two off": with_constant(codes, two_off),
        "codes of two outputs swapped": with_constant(codes, lambda a: a[[1, 0, *range(2, len(a))]]),
        "a scale is 3 % larger": with_constant(
            scales, lambda a: a * np.where(np.arange(a.size) == 9, 1.03, 1).reshape(a.shape).astype(a.dtype)
        ),
        "activations are not rounded": attribute("accuracy_level", lambda a: setattr(a, "i", 0)),
    }


def two_off(codes: np.ndarray) -> np.ndarray:
    codes[3, 0, 5] ^= 0x22
    return codes


LEFT_OUT = {
    "fp16 decoder": ("the cache forgets the newest token",),
    "int8 decoder": ("a number of a matrix is 0.1 % larger",),
    "int4 decoder": ("a number of a matrix is 0.1 % larger",),
}
"""Damage that a kind's graph cannot have: of a float32 cache, of a matrix of floats."""


def rows() -> Iterator[Broken]:
    for kind in (FLOAT, *SCHEMES):
        of_values = {name: change for name, (change, _) in GRAPHS.items()}
        changes = of_values | CONDITIONS | WRITTEN | ({} if kind == FLOAT else quantised(kind))
        for name, change in changes.items():
            if name not in LEFT_OUT.get(kind, ()):
                yield Broken(kind, name, at(kind, change))


CALIBRATED = (
    "calibration moves a weight in 4 bits by up to 2.6 steps, by a text that the folder does not hold: a wrong code that "
    "is nearer than that is what another text would give"
)
OUT_OF_REACH = {"a code is two off": CALIBRATED, "a scale is 3 % larger": CALIBRATED}
ROWS = list(rows())
