"""A published folder to damage, and its cut to damage on the way to one, by one trace for all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

import mptk
from mptk.files import write_json
from mptk.ir import Log, Plan, Samples
from mptk.progress import show_nothing
from mptk.proof.proof import check_proof, make_proof_batches, prove_folder
from mptk.proof.verification import Proof, compile_folder, repeat_proof
from mptk.protocols import Analysed, Compiled, DenseModel, Opened, Prepared, Proven, SampleSets, Target, compute_origin
from mptk.publish.manifest import hash_weight_files, write_manifest
from mptk.run.prepare import resolve_widths
from mptk.run.run import Run
from mptk.targets import ONNX, STOCK_TARGET
from mptk.testing import WORDS, save_word_model
from mptk.testing.decoders import GROUPED, HEAD_SIZE

WINDOW = 64
Edit = Callable[[Path], None]
ASKED = mptk.Settings()
"""What a caller of verify asks for."""


def bare_run(settings: mptk.Settings, plan: Plan | None = None, out: Path = Path("out")) -> Run:
    """A run of which only settings, plan and output count."""
    return Run(log=Log(), progress=show_nothing, source="model", out=out, settings=settings, plan=plan)


def legalise_bare(model: Analysed, settings: mptk.Settings, plan: Plan | None = None) -> Prepared:
    """An analysed model, prepared in a bare run."""
    return resolve_widths(bare_run(settings, plan), settings, DenseModel(Opened(model.loaded, model.task), model))


class Lab:
    """A dense model with a window of 64, and a folder of it that was published with ONNX, int8 and int4.

    The dense model is traced once, at first use; each folder is proven against that trace, and each damaged cut is a
    copy of the sound one.
    """

    def __init__(self, root: Path, scratch: Path) -> None:
        """``root``: as ``write_lab`` wrote it. ``scratch``: a folder for copies."""
        self.dense, self.folder, self.scratch, self.count = root / "dense", root / "out", scratch, 0
        self.report, self.plan = mptk.Report.read(self.folder), mptk.Plan.load(self.folder / "plan.json")

    @cached_property
    def sound(self) -> tuple[Compiled, Samples]:
        """The cut that the folder holds, and the proof's samples."""
        return compile_folder(self.folder, self.report, self.plan, None, ASKED)

    @property
    def compiled(self) -> Compiled:
        return self.sound[0]

    @property
    def sets(self) -> SampleSets:
        """The proof's samples, for every purpose of a run."""
        return SampleSets(*[self.sound[1]] * 3, "")

    @cached_property
    def batches(self) -> list[Samples]:
        """What the proof runs on: a short batch, and a row that crosses the window."""
        return make_proof_batches(self.sound[1], self.report.proof_length)

    def verify(self, folder: Path) -> Proof:
        """As ``mptk.verify``."""
        return repeat_proof(folder, None, ASKED, self.compiled.prepared.analysis)

    def prove(self, folder: Path, compiled: Compiled | None = None, *targets: Target, whole: bool = True) -> Proven:
        """Prove a folder as a run does with what it has just written. ``targets``: of which it is proven, or of all."""
        compiled = compiled or self.compiled
        proven = prove_folder(compiled, targets or (STOCK_TARGET, ONNX), folder, self.sound[1])
        check_proof(proven.differences, "")
        return proven

    def make_run(self) -> Run:
        """A run that would make the folder again, up to its proof."""
        prepared = self.compiled.prepared
        source, out = str(self.dense), self.make_folder()
        run = replace(bare_run(prepared.settings, out=out), source=source)
        return replace(run, origin=compute_origin(source, prepared.given, prepared.settings, None, None))

    def write(self, compiled: Compiled) -> Path:
        """A new folder with the checkpoint of a cut."""
        folder = self.make_folder()
        folder.mkdir()
        STOCK_TARGET.emit(compiled, self.sets, folder, Log())
        return folder

    def copy(self, edit: Edit, *, forged: bool) -> Path:
        """The published folder, edited; ``forged``: with a manifest that fits."""
        copy = self.make_folder()
        shutil.copytree(self.folder, copy)
        edit(copy)
        if forged:
            write_manifest(copy)
        return copy

    def make_folder(self) -> Path:
        self.count += 1
        return self.scratch / f"{self.count}"


def write_lab(root: Path, quantize: tuple[str, ...] = ("int8", "int4")) -> None:
    """Write the dense model of a lab, and prune it."""
    sizes = {**GROUPED, "pad_token_id": None, "head_dim": HEAD_SIZE, "max_position_embeddings": 128}
    config = MistralConfig(**sizes, sliding_window=WINDOW, tie_word_embeddings=True)
    dense = save_word_model(MistralForCausalLM(config), root / "dense")
    generator = torch.Generator().manual_seed(0)
    (root / "text.txt").write_text(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (600,), generator=generator)))
    widths = {"hidden": 40, "q_heads": 2, "ffn": 56}
    settings = mptk.Settings(
        method="magnitude",
        widths=widths,
        families=tuple(widths),
        align=1,
        data=str(root / "text.txt"),
        samples=3,
        length=40,
        eval_length=40,
        quantize=quantize,
    )
    mptk.prune(dense, root / "out", settings)


# ---- edits of a folder ----


def fields(file: str, **changes: Any) -> Edit:
    """Other values in a JSON file. A value is set inside an object if its name has dots, written ``__``."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        for name, value in changes.items():
            *path, leaf = name.split("__")
            inner = content
            for key in path:
                inner = inner[key]
            inner[leaf] = value
        write_json(folder / file, content)

    return edit


def raw_report(folder: Path) -> dict[str, Any]:
    """The content of report.json, for a test to change."""
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return content


def weights(change: Callable[[str, torch.Tensor], torch.Tensor], *, told: bool = True) -> Edit:
    """Other weights, and a digest in the report that fits if it is ``told``."""

    def edit(folder: Path) -> None:
        file = folder / "model.safetensors"
        state = {name: change(name, tensor) for name, tensor in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
        if told:
            write_json(folder / "report.json", raw_report(folder) | {"weights_sha256": hash_weight_files(folder)})

    return edit


def remove(name: str, *, told: bool = False) -> Edit:
    """A file or a folder less, and the report's list without it if it is ``told``."""

    def edit(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if told:
            report = raw_report(folder)
            report["files"] = [f for f in report["files"] if not f.startswith(name)]
            write_json(folder / "report.json", report)

    return edit


def all_of(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits] and None
