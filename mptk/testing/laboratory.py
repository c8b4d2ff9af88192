"""Folders of tiny models that all tests of a run share: each is made at its first use, and by one process only."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mptk
from mptk.config import Settings
from mptk.errors import InputError
from mptk.testing.kinds import MODEL_KINDS, write_data, write_kind

DECODER_RUN: dict[str, Any] = {"sparsity": 0.35, "samples": 4, "length": 48, "eval_length": 48, "align": 8}
OTHER_RUN: dict[str, Any] = {
    "sparsity": 0.3,
    "samples": 4,
    "length": 12,
    "eval_length": 12,
    "eval_windows": 3,
    "align": 2,
    "tolerance": 0.3,
}


class Laboratory:
    """Models, data and pruned folders below ``root``, to be read only; a test damages a ``copy``.

    Processes that have one ``root`` share all of it.
    """

    seconds = 0.0
    """Processor seconds that this process and its children spent in ``make``, for a table of tests' times."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def keep(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder or file ``name`` as ``make`` writes it. Whoever asks first makes it; the others wait.

        Raises:
            InputError: another function made what has this name.
        """
        function = make.func if isinstance(make, partial) else make
        maker = f"{function.__module__}.{function.__qualname__}"
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f"{path.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            made = path.with_name(f"{path.name}.made")
            if not made.exists():
                start, before = sum(os.times()[:4]), Laboratory.seconds
                shutil.rmtree(path, ignore_errors=True)  # of a ``make`` that failed
                make(path)
                made.write_text(maker)
                # ``make`` may ask for other folders, whose time is in this difference already.
                Laboratory.seconds = before + sum(os.times()[:4]) - start
            if (known := made.read_text()) != maker:
                raise InputError(f"{name} is what {known} made; give what {maker} makes a name of its own", name=name)
        return path

    def open_model(self, kind: str = "decoder") -> Path:
        """The checkpoint of a tiny model (``MODEL_KINDS``)."""
        return self.keep(f"models/{kind}", lambda folder: write_kind(kind, folder))

    def open_data(self, kind: str = "decoder") -> Path:
        """What the kind reads: a text file, or a folder of images or sounds."""
        return self.keep("data", write_data) / MODEL_KINDS[kind].data

    def make_settings(self, kind: str = "decoder", **changes: Any) -> Settings:
        """About a third of the model goes, chosen by Wanda on few short samples of ``open_data``; no ONNX."""
        few = DECODER_RUN if kind == "decoder" else OTHER_RUN
        return Settings(**{"method": "wanda", "data": str(self.open_data(kind)), "onnx": False, **few, **changes})

    def prune(self, kind: str, out: Path, **changes: Any) -> Path:
        """Prune the model of a kind anew, with ``changes`` of ``make_settings``. Gives ``out``."""
        mptk.prune(str(self.open_model(kind)), out, self.make_settings(kind, **changes))
        return out

    def open_pruned(self, kind: str = "decoder") -> Path:
        """A pruned folder of the kind, with ONNX."""
        return self.keep(f"pruned/{kind}", lambda out: self.prune(kind, out, onnx=True))

    def open_quantized(self) -> Path:
        """A pruned decoder with a graph of each type: float32, float16, int8 and int4."""
        return self.keep(
            "quantized", lambda out: self.prune("decoder", out, onnx=True, quantize=("int8", "int4", "fp16"))
        )

    def open_recovered(self) -> Path:
        """``open_pruned()`` after two steps of recovery, without ONNX."""
        asked: dict[str, Any] = {"data": str(self.open_data()), "steps": 2, "batch": 2, "length": 32, "onnx": False}
        return self.keep("recovered", lambda out: mptk.recover(self.open_pruned(), out, **asked))

    def open_ladder(self) -> Path:
        """A folder with two sizes of the decoder: 20 % and 40 % pruned, without ONNX."""
        asked: dict[str, Any] = {
            "data": str(self.open_data()),
            "method": "wanda",
            "samples": 4,
            "length": 32,
            "align": 8,
            "onnx": False,
        }
        return self.keep("ladder", lambda out: mptk.ladder(str(self.open_model()), out, [0.2, 0.4], **asked))

    def copy(self, folder: Path, to: Path) -> Path:
        """A copy to damage. Gives ``to``."""
        copy_whole(folder, to)
        return to


def copy_whole(place: Path, to: Path) -> None:
    """Copy a folder or a file.

    No hard links: each one changes the ctime of the original, and a run of another process that reads the original
    meanwhile refuses it as changed.
    """
    if place.is_file():
        shutil.copy2(place, to)
    else:
        shutil.copytree(place, to)
