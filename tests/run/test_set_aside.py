"""Quality is held out by default: what is measured on was not fitted to, and the report says how much it is.

It reaches for the samples of a run, which its report only counts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mptk
from mptk import testing
from mptk.config import IN_MEMORY, Settings
from mptk.errors import DataError
from mptk.io import Aside, Loaded, count_aside, load, open_live
from mptk.io.data import read_evaluation_texts
from mptk.io.text.files import list_texts, read_folder_documents
from mptk.io.text.tokens import encode_documents
from mptk.ir import IGNORED
from mptk.report.summary import list_warnings
from mptk.tasks import bind_task
from mptk.tasks.inputs.text import make_text_rows, split_rows
from mptk.testing import expect_error

ASKED = Settings(samples=1000, length=8, eval_windows=4, eval_length=16)


def write_text(path: Path, words: int) -> Path:
    order = torch.randint(len(testing.WORDS), (words,), generator=torch.Generator().manual_seed(words)).tolist()
    lines = [order[i : i + 12] for i in range(0, words, 12)]
    path.write_text("\n".join(" ".join(testing.WORDS[i] for i in line) for line in lines))
    return path


@pytest.fixture(scope="module")
def decoder():
    return open_live(testing.make_llama(), testing.make_tokenizer())


def draw(loaded: Loaded, settings: Settings) -> tuple[Tensor, Tensor]:
    """Samples to fit to, and to measure on."""
    task = bind_task(loaded)
    fitted = task.draw_samples(loaded, settings, settings.windows, lambda done, total: None)
    return next(iter(fitted.inputs.values())), next(iter(task.draw_evaluation(loaded, settings).inputs.values()))


def read_stream(loaded: Loaded, path: Path) -> Tensor:
    assert loaded.tokenizer is not None
    return encode_documents([iter([path.read_text()])], loaded.tokenizer)


@pytest.mark.parametrize(("words", "windows"), [(400, 4), (60, 2)])
def test_the_first_windows_of_a_text_at_most_a_quarter_are_only_measured_on(words, windows, decoder, tmp_path):
    asked = replace(ASKED, data=str(write_text(tmp_path / "text.txt", words)))
    stream, (fitted, measured) = read_stream(decoder, tmp_path / "text.txt"), draw(decoder, asked)
    assert len(measured) == windows
    border = windows * 16
    rest = stream[border:]
    expected = {tuple(row.tolist()) for row in rest[: len(rest) // 8 * 8].view(-1, 8)}
    assert {tuple(row.tolist()) for row in fitted} == expected
    assert torch.equal(measured.flatten(), stream[:border])


def test_other_data_to_measure_on_sets_nothing_aside(decoder, tmp_path):
    path = str(write_text(tmp_path / "text.txt", 400))
    stream, (fitted, measured) = (
        read_stream(decoder, Path(path)),
        draw(decoder, replace(ASKED, data=path, eval_data=path)),
    )
    assert len(fitted) == len(stream) // 8
    assert len(measured) == 4


def test_a_short_text_gives_one_short_window(decoder, tmp_path):
    asked = replace(ASKED, data=str(write_text(tmp_path / "text.txt", 15)))
    stream, (fitted, measured) = read_stream(decoder, tmp_path / "text.txt"), draw(decoder, asked)
    assert torch.equal(measured[0], stream[: len(stream) // 4])
    assert fitted.numel() <= len(stream) - measured.numel()


def test_of_a_folder_each_fourth_row_and_block_is_set_aside(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(f'{{"text": "row {i}"}}' for i in range(8)))
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "long.txt").write_text("\n".join(f"line {i}" for i in range(20_000)))
    everything = set(list_texts(read_folder_documents(tmp_path)))
    measured, fitted = (
        ["".join(document) for document in read_folder_documents(tmp_path, part=part)]
        for part in ("measured", "fitted")
    )
    assert not {*measured} & {*fitted}
    assert sorted("".join([*measured, *fitted])) == sorted("".join(everything) + "\n" * 19_999)
    assert len(fitted) == pytest.approx(3 * len(measured), abs=3)


def test_a_folder_that_cannot_be_divided_is_refused(decoder, tmp_path):
    write_text(tmp_path / "only.txt", 40)
    with expect_error(DataError, name=str(tmp_path)):
        draw(decoder, replace(ASKED, data=str(tmp_path)))


def test_images_and_other_files_are_set_aside_too(laboratory):
    loaded = load(str(laboratory.open_model("image classifier")))
    data = str(laboratory.open_data("image classifier"))
    fitted, measured = draw(loaded, replace(ASKED, data=data))
    assert len(fitted) >= 3 * len(measured) >= 3
    assert not any(torch.equal(one, other) for one in fitted for other in measured)


@pytest.mark.parametrize(("there", "wanted", "found"), [(1, 4, 0), (2, 4, 1), (7, 4, 1), (16, 4, 4), (99, 4, 4)])
def test_a_quarter_at_most(there, wanted, found):
    assert count_aside(wanted, there) == found


def test_samples_in_memory_are_set_aside_and_examples_are_not():
    net = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 4)).eval()
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    asked = {"sparsity": 0.3, "method": "wanda", "align": 1, "tolerance": 0.2, "progress": None, "onnx": False}
    pruned = mptk.prune(net, example_inputs=x[:2], data=x, **asked)
    examples = mptk.prune(net, example_inputs=x[:2], **asked)
    assert pruned is not None
    assert examples is not None
    rows = pruned.report.data
    assert (rows["evaluation"]["samples"], rows["calibration"]["samples"]) == (2, 7)
    assert rows["evaluation"]["source"].startswith(f"{IN_MEMORY} (2 samples")
    assert "2 samples" in pruned.report.quality["protocol"]
    assert examples.report.data["evaluation"]["source"] == examples.report.data["calibration"]["source"] == IN_MEMORY


def test_a_report_says_how_many_tokens_and_warns_if_one_text_is_for_both(laboratory, tmp_path):
    data = str(write_text(tmp_path / "text.txt", 2000))
    reports = [
        mptk.Report.read(laboratory.prune("decoder", tmp_path / name, data=data, eval_windows=2, **more))
        for name, more in (("apart", {}), ("both", {"eval_data": data}))
    ]
    assert "(96 tokens" in reports[0].quality["protocol"]
    assert reports[0].data["evaluation"]["inputs"] == reports[1].data["evaluation"]["inputs"]
    said = [sum("one text" in each for each in list_warnings(report)) for report in reports]
    assert said == [0, 1]


# ---- models that are measured on single texts ----


@pytest.fixture(scope="module")
def encoder(laboratory):
    return load(str(laboratory.open_model("encoder")))


def test_a_text_is_a_row_as_its_tokenizer_makes_it(encoder):
    texts = [" ".join(testing.WORDS[:n]) for n in (3, 9, 5)]
    rows = split_rows(make_text_rows(encoder, texts, 7))
    assert encoder.tokenizer is not None
    for row, text in zip(rows, texts, strict=True):
        assert row.inputs["input_ids"].tolist() == [encoder.tokenizer(text).input_ids[:7]]
    assert encoder.tokenizer.backend_tokenizer.truncation is None  # else it would be in the folder's tokenizer
    with expect_error(DataError, name="data"):
        make_text_rows(encoder, [], 7)


def test_lines_and_rows_are_texts_and_stay_within_what_is_set_aside(encoder, tmp_path):
    words = encoder.tokenizer
    assert words is not None
    lines = [f"{testing.WORDS[i]} {testing.WORDS[i + 1]}" for i in range(8)]
    (tmp_path / "lines.txt").write_text("\n\n".join(lines))
    (tmp_path / "rows.jsonl").write_text("\n".join(f'{{"text": "{line}"}}' for line in lines))
    for name in ("lines.txt", "rows.jsonl"):
        assert list(read_evaluation_texts(words, str(tmp_path / name), 8, 3)) == lines[:3]
    # A quarter of the text has about two of the lines.
    assert list(read_evaluation_texts(words, str(tmp_path / "lines.txt"), 8, 8, Aside(8, 8))) == lines[:1]
    (tmp_path / "long.txt").write_text(" ".join(testing.WORDS * 20))
    (start,) = read_evaluation_texts(words, str(tmp_path / "long.txt"), 8, 4, Aside(4, 8))
    assert start.split() == testing.WORDS[: len(start.split())]


@pytest.mark.features
@pytest.mark.parametrize("kind", ["encoder", "text classifier"])
def test_encoders_are_measured_on_single_texts_of_their_own_length(kind, laboratory, tmp_path):
    texts = [" ".join(testing.WORDS[i : i + 2 + i % 4]) for i in range(5)] * 8
    path = tmp_path / "text.txt"
    path.write_text("\n".join(texts))
    asked = {"eval_windows": 5, "eval_length": 12}
    out = laboratory.prune(kind, tmp_path / "out", data=str(path), **asked)
    report = mptk.Report.read(out)
    shape = report.data["evaluation"]["inputs"]["input_ids"]["shape"]
    assert shape[0] == 5
    assert "single texts of" in report.quality["protocol"]
    # The same by hand, one text after the other.
    again = mptk.evaluate(out, texts[:5], dense=str(laboratory.open_model(kind)), length=12, progress=None)
    assert again["model"] == pytest.approx(report.quality["pruned"], abs=1e-5)
    named = mptk.evaluate(out, str(path), windows=5, length=12, progress=None)
    assert named["model"] == pytest.approx(again["model"], abs=1e-6)
    settings = laboratory.make_settings(kind, **asked)
    found = mptk.prune(str(laboratory.open_model(kind)), settings=settings, data=iter(texts), progress=None)
    assert found is not None
    assert "single texts of" in found.report.quality["protocol"]


def test_what_rows_are_padded_with_is_no_token(encoder):
    made = make_text_rows(encoder, ["a b c d", "a b"], 12).inputs["input_ids"]
    assert int((made == IGNORED).sum()) > 0
