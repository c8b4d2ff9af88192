"""Training text of the quality benchmark: all of some files, in shuffled pieces, without what is evaluated on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

PIECE = 4000
"""Characters of a document that stay together."""
HELD_OUT = 200
"""Last documents of the C4 file, which are evaluated on and not trained on."""


def documents(file: Path) -> list[str]:
    """Texts of a plain file or of JSON lines: the column ``text``, or all strings of a row."""
    if file.suffix != ".jsonl":
        return [file.read_text()]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [r.get("text") or "\n".join(v for v in r.values() if isinstance(v, str) and v) for r in rows]


def pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), PIECE):
        yield text[start : start + PIECE]


def write_mixture(sources: Sequence[Path], c4: Path, folder: Path) -> tuple[Path, Path]:
    """Files of JSON lines for training (all pieces in random order) and of held-out C4; folders give all they hold.

    Files named ``*test*`` are left out.
    """
    files = [f for s in sources for f in (sorted(s.rglob("*")) if s.is_dir() else [s])]
    chosen = [f for f in files if f.suffix in (".jsonl", ".raw", ".txt") and "test" not in f.name]
    texts: list[str] = []
    for file in chosen:
        found = documents(file)
        texts += found[:-HELD_OUT] if file.resolve() == c4.resolve() else found
    mixed = [p for text in texts for p in pieces(text)]
    random.Random(0).shuffle(mixed)
    folder.mkdir(parents=True, exist_ok=True)
    training, held_out = folder / "training.jsonl", folder / "c4.jsonl"
    for path, rows in ((training, mixed), (held_out, documents(c4)[-HELD_OUT:])):
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return training, held_out
