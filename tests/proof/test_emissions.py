"""Broken emissions: what another program would read of a folder, broken in one way, and where the proof says so.

Each row of ``GRAPHS`` and ``FILES`` is one of them. All are put into a published folder whose manifest fits, which
``verify`` must refuse; and into what ``prune`` writes, of which then nothing is published.

It reaches for passes.targets.onnx.names: the files to damage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from graph_damage import damaged, exchanged, rewired
from inside import Inside
from lab import Edit, Lab, after, fields, remembered

import mptk
from mptk import MptkError
from mptk.files import write_json
from passes.targets.onnx.names import ENDINGS

TOKENS = 40
"""Of a sample of the lab, and of the proof's short rows."""
PREFILL, LEFT, RIGHT, DECODE = (f"ONNX Runtime {name}" for name in ("prefill", "padded left", "padded right", "decode"))
ROWS = ("shape = Shape(input_ids)", "rows = Gather(shape, 0)")
NEW = ("shape = Shape(input_ids)", "new = Gather(shape, 1)")
TOTAL = ("size = Shape(attention_mask)", "total = Gather(size, 1)")
PAST = ("size = Shape(past_key_values.0.key)", "past = Gather(size, 2)")


def flow(value: str, *lines: str) -> Edit:
    """An input or an output of the float graph damaged."""
    return lambda folder: rewired(folder / "onnx" / "model.onnx", value, *lines) and None


def swap(one: str, other: str) -> Edit:
    """Two outputs of the float graph in each other's place."""
    return lambda folder: exchanged(folder / "onnx" / "model.onnx", one, other) and None


def wrong_if(*lines: str) -> Edit:
    """Logits that are off by 0.1 if ``wrong`` is true."""
    return flow("logits", *lines, "by = Cast<to=1>(wrong)", "tenth = Mul(by, 0.1)", "damaged = Add(logits, tenth)")


UNMASKED = ("nothing = Mul(attention_mask, 0)", "ones = Add(nothing, 1)")
GRAPHS: dict[str, tuple[Edit, str]] = {
    "ignores the mask": (flow("attention_mask", *UNMASKED[:1], "damaged = Add(nothing, 1)"), LEFT),
    "ignores the mask of a prompt": (
        flow(
            "attention_mask",
            *PAST,
            *UNMASKED,
            "cached = Greater(past, 0)",
            "damaged = Where(cached, attention_mask, ones)",
        ),
        LEFT,
    ),
    "ignores the mask after a prompt": (
        flow(
            "attention_mask",
            *PAST,
            *UNMASKED,
            "cached = Greater(past, 0)",
            "damaged = Where(cached, ones, attention_mask)",
        ),
        LEFT,
    ),
    "takes the first row's mask for all": (
        flow(
            "attention_mask",
            "first = Gather(attention_mask, [0])",
            "size = Shape(attention_mask)",
            "damaged = Expand(first, size)",
        ),
        LEFT,
    ),
    "ignores positions": (
        flow("position_ids", "damaged = Mul(position_ids, 0)"),
        PREFILL,
    ),
    "counts padding in positions": (
        flow(
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
    "wrong at one row": (wrong_if(*ROWS, "wrong = Equal(rows, 1)"), PREFILL),
    "wrong at two rows and more": (wrong_if(*ROWS, "wrong = Greater(rows, 1)"), PREFILL),
    "wrong at three rows and more": (wrong_if(*ROWS, "wrong = Greater(rows, 2)"), PREFILL),
    "wrong in prompts of more than 48 tokens": (wrong_if(*NEW, "wrong = Greater(new, 48)"), PREFILL),
    "wrong in decoding beyond 48 tokens": (
        wrong_if(*TOTAL, *NEW, "far = Greater(total, 48)", "few = Less(new, 8)", "wrong = And(far, few)"),
        DECODE,
    ),
    "wrong with a cache": (wrong_if(*PAST, "wrong = Greater(past, 0)"), LEFT),
    "wrong with several tokens and a cache": (
        wrong_if(*PAST, *NEW, "cached = Greater(past, 0)", "many = Greater(new, 1)", "wrong = And(cached, many)"),
        LEFT,
    ),
    "a position too far at the last step": (
        flow(
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
    "the last row's logits are scaled": (
        flow(
            "logits",
            "head = Slice(logits, [0], [-1], [0])",
            "tail = Slice(logits, [-1], [999], [0])",
            "more = Mul(tail, 1.01)",
            "damaged = Concat<axis=0>(head, more)",
        ),
        PREFILL,
    ),
    "every row is the first one": (
        flow("logits", "first = Gather(logits, [0])", "size = Shape(logits)", "damaged = Expand(first, size)"),
        PREFILL,
    ),
    "one row only": (flow("logits", "damaged = Gather(logits, [0])"), PREFILL),
    "the last position only": (flow("logits", "damaged = Slice(logits, [-1], [999], [1])"), PREFILL),
    "positions in another order": (flow("logits", "damaged = Slice(logits, [-1], [-999], [1], [-1])"), PREFILL),
    "tokens one row further": (
        flow(
            "logits",
            "head = Slice(logits, [0], [-1], [2])",
            "tail = Slice(logits, [-1], [999], [2])",
            "damaged = Concat<axis=2>(tail, head)",
        ),
        PREFILL,
    ),
    "a token is missing": (flow("logits", "damaged = Slice(logits, [0], [-1], [2])"), PREFILL),
    "logits are probabilities": (flow("logits", "damaged = Softmax(logits)"), PREFILL),
    "keys of another layer": (swap("present.0.key", "present.1.key"), LEFT),
    "values of another layer": (swap("present.0.value", "present.1.value"), LEFT),
    "keys for values": (swap("present.1.key", "present.1.value"), LEFT),
    "heads of the cache in another order": (
        flow("present.0.key", "damaged = Slice(present.0.key, [-1], [-999], [1], [-1])"),
        LEFT,
    ),
    "the cache of the first row for all": (
        flow(
            "present.1.value",
            "first = Gather(present.1.value, [0])",
            "size = Shape(present.1.value)",
            "damaged = Expand(first, size)",
        ),
        LEFT,
    ),
    "the cache forgets the newest token": (
        flow(
            "present.0.value",
            "head = Slice(present.0.value, [0], [-1], [2])",
            "tail = Slice(present.0.value, [-1], [999], [2])",
            "none = Mul(tail, 0.0)",
            "damaged = Concat<axis=2>(head, none)",
        ),
        LEFT,
    ),
}


def ids_swapped(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    one, other = sorted(ids, key=ids.__getitem__)[10:12]
    ids[one], ids[other] = ids[other], ids[one]
    write_json(folder / "tokenizer.json", content)


def added(name: str, content: str) -> Edit:
    """A file more, of which the report knows."""

    def edit(folder: Path) -> None:
        (folder / name).write_text(content)
        if (folder / "report.json").is_file():
            report = json.loads((folder / "report.json").read_text())
            write_json(folder / "report.json", report | {"files": sorted([*report["files"], name])})

    return edit


SAVED, DESCRIBED = "passes.targets.stock.emit.save_tokenizer", "mptk.targets.onnx.describe_graphs"
FILES: dict[str, tuple[Edit, str, str, int]] = {
    "end of a text": (
        fields("tokenizer_config.json", eos_token="w1"),
        "eos_token of tokenizer_config.json is",
        SAVED,
        1,
    ),
    "padding side": (
        fields("tokenizer_config.json", padding_side="left"),
        'padding_side of tokenizer_config.json is "left", but',
        SAVED,
        1,
    ),
    "class of the tokenizer": (
        fields("tokenizer_config.json", tokenizer_class="LlamaTokenizer"),
        "tokenizer_class of tokenizer_config.json is",
        SAVED,
        1,
    ),
    "two ids in each other's place": (ids_swapped, r"model\.vocab\.\S+ of tokenizer.json is \d+, but \d+", SAVED, 1),
    "a token more": (
        added("added_tokens.json", '{"<x>": 96}'),
        "added_tokens.json is not a file of the dense model",
        SAVED,
        1,
    ),
    "a chat template": (
        added("chat_template.jinja", "{{ messages }}"),
        "chat_template.jinja is not a file of the dense model",
        SAVED,
        1,
    ),
    "a processor": (
        added("preprocessor_config.json", "{}"),
        "preprocessor_config.json is not a file of the dense model",
        SAVED,
        1,
    ),
    "genai: end of a text": (
        fields("genai_config.json", model__eos_token_id=7),
        "model.eos_token_id of genai_config.json is 7, but 1",
        DESCRIBED,
        3,
    ),
    "genai: layers": (
        fields("genai_config.json", model__decoder__num_hidden_layers=3),
        "model.decoder.num_hidden_layers of genai_config.json is 3, but 2",
        DESCRIBED,
        3,
    ),
    "genai: graph": (
        fields("genai_config.json", model__decoder__filename="onnx/model_q4.onnx"),
        "model.decoder.filename of genai_config.json is",
        DESCRIBED,
        3,
    ),
}


LONG = (
    "takes the first row's mask for all",
    "ignores positions",
    "wrong at two rows and more",
    "wrong with a cache",
    "every row is the first one",
    "positions in another order",
    "tokens one row further",
    "a token is missing",
    "logits are probabilities",
    "values of another layer",
    "keys for values",
    "heads of the cache in another order",
    "the cache of the first row for all",
    "genai: end of a text",
    "genai: graph",
    "class of the tokenizer",
)
"""Rows that the short tests leave out: the same check finds them as it finds another row."""
QUICK = ("ignores the mask", "genai: layers")
"""Rows that `prune` meets in the short tests, too."""


def rows(table: Iterable[str], quick: Callable[[str], bool]) -> list[ParameterSet]:
    """All rows of a table, those that are not quick as long tests."""
    return [pytest.param(name, marks=() if quick(name) else pytest.mark.long) for name in table]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with remembered():
        yield Lab(tmp_path_factory.mktemp("lab"), quantize=())


@pytest.mark.parametrize("name", rows(GRAPHS, lambda name: name not in LONG))
def test_verify_refuses_a_graph(lab: Lab, name: str) -> None:
    edit, stage = GRAPHS[name]
    with pytest.raises(MptkError, match=f"the proof fails at '{stage}'") as error:
        mptk.verify(lab.copy(edit, forged=True))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", rows(FILES, lambda name: name not in LONG))
def test_verify_refuses_a_file_by_its_name_and_its_field(lab: Lab, name: str) -> None:
    edit, line, *_ = FILES[name]
    with pytest.raises(MptkError, match=f"the proof fails at 'config': {line}") as error:
        mptk.verify(lab.copy(edit, forged=True))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", rows(GRAPHS, QUICK.__contains__))
def test_prune_publishes_no_such_graph(lab: Lab, inside: Inside, name: str) -> None:
    edit, stage = GRAPHS[name]
    after("mptk.tasks.onnx_export.emit_onnx", lambda graphs: edit(graphs.parent), 1)(inside)
    refused(lab, f"the proof fails at '{stage}'")


@pytest.mark.parametrize("name", rows(FILES, QUICK.__contains__))
def test_prune_publishes_no_such_file(lab: Lab, inside: Inside, name: str) -> None:
    edit, line, step, argument = FILES[name]
    after(step, edit, argument)(inside)
    refused(lab, f"the proof fails at 'config': {line}")


def refused(lab: Lab, line: str) -> None:
    """Prune must refuse, and leave nothing."""
    before = sorted(path.name for path in lab.root.iterdir())
    with pytest.raises(MptkError, match=line):
        lab.prune(strict=True)
    assert sorted(path.name for path in lab.root.iterdir()) == before


# ---- what is optional ----


def broken(scheme: str) -> Callable[[Inside], None]:
    """A quantised graph that comes out with scales twice as large, or (int4) cannot be made."""

    def quantize(original: Callable[..., object], file: Path, kind: str, *others: object) -> None:
        if kind == scheme == "int4":
            raise MptkError("this model has no int4; leave it out")
        original(file, kind, *others)
        if kind == scheme:
            damaged(file.with_stem(file.stem + ENDINGS[kind]), "_scales", lambda scales: 2 * scales)

    return lambda inside: inside.around("mptk.tasks.onnx_export.quantize_onnx", quantize)


GENAI = "genai_config.json"
LEFT_OUT: dict[str, tuple[Callable[[Inside], None], str, str]] = {
    "int8": (broken("int8"), "onnx/model_quantized.onnx", "the proof fails at 'int8 weights': "),
    "int4": (broken("int4"), "onnx/model_q4.onnx", "this model has no int4"),
    "genai": (
        after(DESCRIBED, fields(GENAI, model__vocab_size=5), 3),
        GENAI,
        "the proof fails at 'config': model.vocab",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_an_optional_file_that_fails_is_left_out_with_a_note(lab: Lab, inside: Inside, name: str) -> None:
    inject, file, reason = LEFT_OUT[name]
    inject(inside)
    out = lab.prune(quantize=("int8", "int4"))
    report = mptk.Report.read(out)
    (note,) = [note for note in report.notes if "left out" in note]
    assert note.startswith(f"{file} was left out: {reason}")
    assert "do not use it" not in note
    assert not list(out.glob(f"{file}*"))
    assert not [path for path in report.files if path.startswith(file)]
    assert set(report.quantized) == {"int8", "int4"} - {name}
    assert all("quality" in row for row in report.quantized.values())
    assert Path(file).name not in (out / "README.md").read_text().replace(note, "")
    assert not [row for row in report.proof if row["stage"].startswith(name)]
    inside.undo()
    assert [d.stage for d in mptk.verify(out)] == [row["stage"] for row in report.proof]


@pytest.mark.parametrize("name", rows(LEFT_OUT, "int8".__eq__))
def test_strict_refuses_the_whole_for_an_optional_file(lab: Lab, inside: Inside, name: str) -> None:
    inject, _, reason = LEFT_OUT[name]
    inject(inside)
    with pytest.raises(MptkError, match=reason):
        lab.prune(quantize=("int8", "int4"), strict=True)


@pytest.mark.long
def test_export_and_recover_leave_it_out_too(
    lab: Lab, inside: Inside, typed: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    inject, file, _ = LEFT_OUT["int8"]
    inject(inside)
    out = lab.root / "exported"
    command = ["export", str(lab.dense), "--quantize", "int8", "--out", str(out)]
    assert typed(*command) == 0
    assert f"{file} was left out: the proof fails at 'int8 weights'" in capsys.readouterr().out.replace("\n", " ")
    assert not (out / file).exists()
    assert typed(*command, "--strict") == 1
    how = {"steps": 2, "batch": 2, "micro": 2, "length": 40, "eval_length": 40, "quantize": "int8"}
    found = mptk.recover(lab.folder, lab.root / "recovered", data=lab.settings.data, **how)
    assert [note for note in found.report.notes if note.startswith(f"{file} was left out: ")]
