"""Run every broken emission, and count what is refused.

    python -m tests.broken [--kinds gguf,"side files"] [--json FILE]

Prints each row that passes in silence, and a table: kind, rows, caught, silent. Exit code 1 if a row is silent and
is not named in ``OUT_OF_REACH`` of its file, with the reason.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does: the tests' modules import each other by name

import tests.broken as package
from benchmarks.common import result_header, write_result
from tests.broken import Broken, Publish, Published, check


def gathered() -> dict[str, tuple[list[Broken], Publish, dict[str, str]]]:
    """Kind → its rows, what publishes it, and row → the reason why it is out of reach."""
    found: dict[str, tuple[list[Broken], Publish, dict[str, str]]] = {}
    for each in pkgutil.iter_modules(package.__path__):
        if each.name.startswith("_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{each.name}")
        for row in module.ROWS:
            found.setdefault(row.kind, ([], module.publish, getattr(module, "OUT_OF_REACH", {})))[0].append(row)
    return found


def main(
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    kinds: Annotated[str, typer.Option(help="kinds, separated by commas; without it all")] = "",
) -> None:
    torch.set_num_threads(1)
    known, rows, silent = gathered(), list[dict[str, object]](), 0
    asked = kinds.split(",") if kinds else list(known)
    if unknown := set(asked) - known.keys():
        raise typer.BadParameter(f"no kind {min(unknown)}; there are {', '.join(known)}")
    for kind in asked:
        broken, publish, beyond = known[kind]
        with tempfile.TemporaryDirectory(prefix="broken-") as temporary:
            published: Published = publish(kind, Path(temporary))
            published.verify(published.place)  # what is whole must pass, or a refusal says nothing
            for row in broken:
                by = check(row, published)
                reason = "" if by else beyond.get(row.name, "")
                silent += not by and not reason
                rows.append({"kind": kind, "name": row.name, "caught": bool(by), "by": by or reason})
                print(f"{kind}, {row.name}: {by or reason or 'SILENT'}", flush=True)
                if json_file is not None:
                    write_result(json_file, result_header(), rows)
    print("\n| kind | rows | caught | silent |", "|---|---:|---:|---:|", sep="\n")
    counts = Counter((str(row["kind"]), bool(row["caught"])) for row in rows)
    for kind in asked:
        caught, passed = counts[kind, True], counts[kind, False]
        print(f"| {kind} | {caught + passed} | {caught} | {passed} |")
    raise typer.Exit(int(silent > 0))


if __name__ == "__main__":
    typer.run(main)
