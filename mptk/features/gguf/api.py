"""api: the GGUF file of a pruned folder, from Python."""

from __future__ import annotations

from pathlib import Path

from mptk.api.pruned import Pruned
from mptk.api.words import wrap_public
from mptk.features.gguf import GgufType
from mptk.features.gguf.folder import GgufFolder
from mptk.features.gguf.prove import open_folder, run_llama_cpp
from mptk.files import expand_path, write_result
from mptk.files.outputs import check_apart, check_file


@wrap_public
def gguf(
    folder: str | Path | Pruned,
    out: str | Path,
    *,
    like: str | Path | None = None,
    type: GgufType = "auto",
    overwrite: bool = False,
) -> GgufFolder:
    """Write a pruned model as the GGUF file ``out`` for llama.cpp; returns what it holds.

    Args:
        folder: an ``out`` folder of ``prune`` or ``recover``, of the stock or the graph target; or a ``Pruned``, with
            the weights that it has now.
        like: the dense model's GGUF file, or the alias of a packaged one. The vocabulary comes from it, or else from
            the folder. A folder of the graph target needs it.
        type: the type of the matrices; auto: the type in which the folder has them.
        overwrite: replace a file that ``gguf`` did not write, too.

    Raises:
        MptkError: ``folder`` or ``like`` cannot be read; they do not belong to one model; llama.cpp cannot compute it;
            or ``out`` cannot be written.
        ProofError: the file, which is read back, differs from the folder; or llama.cpp, if it can be imported, computes
            something else of it. Nothing is written then.
    """
    folder = folder.place if isinstance(folder, Pruned) else folder
    check_file(out, "GGUF", overwrite)
    made = open_folder(folder, like, type)
    check_apart(out, made.place, *([] if made.pattern is None else [made.pattern.file]))

    # The file is read back, and run if llama.cpp is here, before it gets its name.
    def write(file: Path) -> None:
        differences = made.write(file)
        proof, notes = run_llama_cpp(made, file)
        made.proof, made.notes = [*differences, *proof], [*made.notes, *notes]

    write_result(expand_path(out), write)
    return made
