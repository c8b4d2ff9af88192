"""The quality benchmark's training text: all of it, and nothing that is evaluated on."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.quality_text import HELD_OUT, PIECE, write_mixture


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_training_text_is_everything_but_what_is_evaluated_on(tmp_path: Path) -> None:
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
