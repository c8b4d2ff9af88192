"""graph_files: where the graphs of a folder are. The module imports no torch and no onnxruntime, which take seconds."""

from __future__ import annotations

from pathlib import Path

from mptk.errors import FileError
from mptk.io import check_folder_named

# optimum's names of files. ``passes/targets/onnx`` has them, too, but is a layer above.
GRAPH_FILE = "model.onnx"
MERGED_FILE = "decoder_model_merged.onnx"
"""A decoder that reads embeddings, or what an encoder gives."""


def find_graph(path: str | Path) -> Path | None:
    """``path`` itself, or the main graph in ``path`` or ``path/onnx``; None if there is none."""
    path = Path(path)
    folders = (path, path / "onnx") if path.is_dir() else ()
    places = [folder / name for folder in folders for name in (GRAPH_FILE, MERGED_FILE)] or [path]
    return next((file for file in places if file.is_file()), None)


def find_onnx_file(path: str | Path) -> Path:
    """``find_graph``. Raises MptkError if there is none."""
    if (file := find_graph(path)) is not None:
        return file
    check_folder_named(path, "export")
    missing = Path(path) / GRAPH_FILE if Path(path).is_dir() else path
    raise FileError(f"there is no {missing}; make one with `mptk export MODEL --out DIR`", name=missing)


def find_model_folder(path: str | Path) -> Path:
    """The folder with a decoder's config and tokenizer: the graph's, or the one above if it is named ``onnx``."""
    folder = find_onnx_file(path).parent
    return folder.parent if folder.name == "onnx" and not (folder / "config.json").is_file() else folder
