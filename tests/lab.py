"""Published folders to damage, and steps to damage on the way to one, without tracing the same model again and again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from inside import Inside, changed
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

import mptk
import passes.frontend.trace
from mptk.files import write_json
from mptk.io import models
from mptk.ir.passes import Log
from mptk.ir.plan import Plan
from mptk.ir.program import Program
from mptk.progress import show_nothing
from mptk.protocols.chain import Prepared
from mptk.protocols.conversion import Analysed, DenseModel, Opened
from mptk.publish.manifest import write_manifest
from mptk.run.prepare import resolve_widths
from mptk.run.run import Run
from mptk.testing import WORDS, draw_plan, save_word_model
from mptk.testing.decoders import GROUPED, HEAD_SIZE
from passes.analysis import group

WINDOW = 64
Edit = Callable[[Path], None]


def bare_run(settings: mptk.Settings, plan: Plan | None = None, out: Path = Path("out")) -> Run:
    """A run of which only settings, plan and output count."""
    return Run(log=Log(), progress=show_nothing, source="model", out=out, settings=settings, plan=plan)


def legalise_bare(model: Analysed, settings: mptk.Settings, plan: Plan | None = None) -> Prepared:
    """An analysed model, prepared in a bare run."""
    return resolve_widths(bare_run(settings, plan), settings, DenseModel(Opened(model.loaded, model.task), model))


@contextmanager
def remembered() -> Iterator[None]:
    """Within it, models are loaded, traced and analysed once; every cut, emission and proof is done anew."""
    with changed() as inside:
        for owner, name, key in (
            (passes.frontend.trace, "trace_to_program", lambda model, *_, **o: (id(model), str(o))),
            (group, "analyze_program", lambda program: id(program)),
        ):
            inside.bound(f"{owner.__name__}.{name}", once(getattr(owner, name), key))
        load, dense = models.open_weights, once(models.open_weights, lambda model, *_, **__: model)
        inside.bound(
            "mptk.io.models.open_weights",
            lambda model, *a, **o: (dense if Path(model).name == "dense" else load)(model, *a, **o),
        )
        yield


def once(function: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def asked(*arguments: Any, **options: Any) -> Any:
        asks = key(*arguments, **options)
        if asks not in known:
            known[asks] = (function(*arguments, **options), arguments)  # the arguments keep their ids
        return known[asks][0]

    return asked


class Lab:
    """A dense model, a plan for it, and a folder that was published with ONNX, quantised too."""

    def __init__(self, root: Path, quantize: tuple[str, ...] = ("int8", "int4")) -> None:
        self.root, self.count = root, 0
        sizes = {**GROUPED, "pad_token_id": None, "head_dim": HEAD_SIZE, "max_position_embeddings": 128}
        config = MistralConfig(**sizes, sliding_window=WINDOW, tie_word_embeddings=True)
        self.dense = save_word_model(MistralForCausalLM(config), root / "dense")
        loaded = models.load(self.dense)
        analysis = group.analyze_program(passes.frontend.trace.trace_to_program(loaded.model, dynamic=True))
        draw_plan(analysis, ["hidden", "q_heads", "ffn"], share=0.7).save(root / "plan.json")
        text = root / "text.txt"
        generator = torch.Generator().manual_seed(0)
        text.write_text(" ".join(WORDS[i] for i in torch.randint(len(WORDS), (600,), generator=generator)))
        self.settings = mptk.Settings(
            method="wanda", plan=str(root / "plan.json"), data=str(text), samples=3, length=40, eval_length=40
        )
        self.folder = self.prune(quantize=quantize)

    def prune(self, **changes: Any) -> Path:
        self.count += 1
        out = self.root / f"out{self.count}"
        mptk.prune(self.dense, out, replace(self.settings, **changes))
        return out

    def copy(self, edit: Edit, *, forged: bool) -> Path:
        """The published folder, edited; ``forged``: with a manifest that fits."""
        self.count += 1
        copy = self.root / f"copy{self.count}"
        shutil.copytree(self.folder, copy)
        edit(copy)
        if forged:
            write_manifest(copy)
        return copy


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
        from mptk.publish.manifest import hash_weight_files

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


# ---- steps that go wrong ----


def cut_wrongly(
    damage: Callable[[Program], Program], target: str = "mptk.compile.cut.cut_program"
) -> Callable[[Inside], None]:
    """The rewritten program comes out damaged."""

    def damaged(pruned: Any) -> Any:
        program = damage(pruned.program)
        return replace(pruned, program=program, exact=program)

    return lambda inside: inside.spoil(target, damaged)


def state(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Program], Program]:
    """One weight of a program changed."""
    return lambda program: program.with_state({name: change(program.state[name]).contiguous()})


def swapped(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """The first two blocks of ``size`` rows in each other's place."""
    first, second = tensor[:size], tensor[size : 2 * size]
    return torch.cat([second, first, tensor[2 * size :]])


def constant(old: int, new: int) -> Callable[[Program], Program]:
    """One whole number in the shapes of a program changed."""

    def change(program: Program) -> Program:
        graph = program.copy_graph()
        node = next(n for n in graph.graph.nodes if "reshape" in str(n.target) and old in n.args[1])
        node.update_arg(1, [new if size == old else size for size in node.args[1]])
        graph.recompile()
        return replace(program, graph=graph)

    return change


def after(target: str, edit: Edit, argument: int) -> Callable[[Inside], None]:
    """What the function ``target`` has written into the folder it was given is edited at once."""

    def edited(real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        edit(Path(arguments[argument]))
        return result

    return lambda inside: inside.around(target, edited)
