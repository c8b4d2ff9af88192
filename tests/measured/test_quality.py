"""The quality benchmark: what it trains on, and which rows it computes anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from inside import changed

from benchmarks import quality
from benchmarks.quality_text import HELD_OUT, PIECE, write_mixture
from mptk import testing

pytestmark = pytest.mark.features


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_training_text_is_everything_but_what_is_evaluated_on(tmp_path):
    source = tmp_path / "text"
    source.mkdir()
    c4 = source / "c4.jsonl"
    c4.write_text("".join(json.dumps({"text": f"c4 {i}", "url": "x"}) + "\n" for i in range(HELD_OUT + 3)))
    (source / "dialogue.jsonl").write_text(json.dumps({"question": "why", "answer": "so"}) + "\n")
    (source / "long.txt").write_text("a" * PIECE + "b")
    (source / "wiki.test.raw").write_text("secret")
    training, held_out = write_mixture([source], c4, tmp_path / "work")
    expected = ["c4 0", "c4 1", "c4 2", "why\nso", "a" * PIECE, "b"]
    assert sorted(texts(training)) == sorted(expected)
    assert texts(training) != expected
    assert texts(held_out) == [f"c4 {i}" for i in range(3, HELD_OUT + 3)]


@pytest.fixture
def place(tmp_path):
    """A folder with the text of a benchmark of a toy model."""
    testing.save_model(testing.make_llama(max_position_embeddings=600), tmp_path / "dense")
    text = "the quick brown fox jumps over a lazy dog. " * 40
    (tmp_path / "train.txt").write_text(text * 40)
    (tmp_path / "wiki.test.raw").write_text(text * 10)
    (tmp_path / "c4.jsonl").write_text((json.dumps({"text": text}) + "\n") * HELD_OUT)
    return tmp_path


def rows(place: Path, methods: str, widths: str = "", tokens: int = 0) -> list[dict[str, object]]:
    """The rows of the file after a run of the benchmark, without the dense one."""
    file = place / "quality.json"
    files = {"train": str(place / "train.txt"), "wikitext": str(place / "wiki.test.raw"), "c4": place / "c4.jsonl"}
    asked = {"methods": methods, "tokens": tokens, "widths": widths, "sparsities": "0.357", "seeds": "0", "batch": 1}
    asked |= {"rank": None, "lr": None, "windows": 2, "tasks": "", "include_path": None, "limit": None}
    quality.main(model=str(place / "dense"), json_file=file, work=place / "work", **files, **asked)
    return [row for row in quality.rows_in(file) if row["method"] != "dense"]


def test_a_row_is_computed_once_and_at_other_widths_again(place):
    rows(place, "magnitude", widths="ffn=32")
    found = rows(place, "magnitude")
    assert [row["given"] for row in found] == [{"ffn": 32}, {}]
    # A mark in the file stays there.
    file = place / "quality.json"
    file.write_text(file.read_text().replace('"magnitude"', '"magnitude", "mark": 1'))
    assert [row["mark"] for row in rows(place, "magnitude")] == [1, 1]
    assert [row["mark"] for row in rows(place, "magnitude", widths="ffn=32")] == [1, 1]


def test_an_interrupted_row_goes_on_where_it_was(place, inside):
    rows(place, "magnitude")  # the dense row, too
    with changed() as stopping:
        stopping.stop("benchmarks.quality.measure", error=KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            rows(place, "wanda", tokens=1024)
    inside.forbid("benchmarks.quality.prune")
    _, resumed = rows(place, "wanda", tokens=1024)
    assert (resumed["method"], resumed["tokens"], resumed["rank"]) == ("wanda", 1024, 0)
    assert not list((place / "work").glob("row-*"))


def test_minutes_give_steps_to_a_method_that_learns_nothing_too(place):
    """As many as fit, so that methods are compared in equal time."""
    trains = {"rank": None, "lr": None, "batch": 1, "compute": "float32"}
    few, more = (
        quality.settings(str(place / "dense"), "wanda+fit", 0.357, 0, 0, place / "work", {}, trains, minutes)
        for minutes in (1.0, 2.0)
    )
    assert 0 < few.steps < more.steps
    assert (few.minutes, few.windows) == (1.0, 96)
