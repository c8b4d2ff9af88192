"""No file lets a model's code run: every command and every public function, on hostile folders of four forms.

Each form is a folder that mptk published, with code planted in it. Its report says ``trust_remote_code`` and so
does its manifest, which fits the files; a plan that says it is refused. If the code runs, it leaves a file.
"""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refused
from inside import Stopped
from lab import raw_report
from stops import stop_at
from typer.main import get_command
from typer.testing import CliRunner

import mptk
from mptk import MptkError, Pruned, testing
from mptk.cli.main import app
from mptk.files import write_json
from mptk.publish.manifest import write_manifest
from mptk.trust import NO_CODE, trust_by_caller

TRUE = "trust_remote_code"
ROOT = Path(mptk.__file__).parents[1]
SHORT: dict[str, Any] = {"method": "magnitude", "samples": 2, "length": 16, "eval_length": 16, "align": 1}
SHORT["progress"] = None
FEW = "--samples 2 --length 16"
QUICK = f"{FEW} --method magnitude --eval-length 16 --align 1 --no-onnx"


# ---- the forms ----


def plant_model_class(folder: Path) -> None:
    """The config names a class in the folder, which has no graphs, so that torch must run it."""
    shutil.rmtree(folder / "onnx", ignore_errors=True)
    merge(folder / "config.json", auto_map={"AutoConfig": "e.Own", "AutoModelForCausalLM": "e.Own"}, model_type="own")


def plant_tokenizer_class(folder: Path) -> None:
    """Only the tokenizer's config names one."""
    merge(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["e.Own", "e.Own"]}, tokenizer_class="Own")


def plant_beside(folder: Path) -> None:
    """A generation loop, which transformers loads beside the weights; and processors, which text needs none of."""
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "e.py", folder / "custom_generate" / "generate.py")
    merge(folder / "generation_config.json", custom_generate=str(folder), trust_remote_code=True)
    classes = {"AutoProcessor": "e.Own", "AutoImageProcessor": "e.Own", "AutoFeatureExtractor": "e.Own"}
    for name in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        write_json(folder / name, {"auto_map": classes, "processor_class": "Own"})


def merge(file: Path, **fields: object) -> None:
    write_json(file, {**json.loads(file.read_text()), **fields})


FORMS: dict[str, Callable[[Path], None]] = {
    "model class": plant_model_class,
    "tokenizer class": plant_tokenizer_class,
    "code beside the model": plant_beside,
    "ladder": plant_model_class,
}


pytestmark = [pytest.mark.features, pytest.mark.usefixtures("own_modules")]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A pruned folder with graphs, and a ladder whose sizes share weights."""
    base = tmp_path_factory.mktemp("sound")
    testing.save_word_model(testing.make_llama(layers=1), base / "dense")
    dense = str(base / "dense")
    mptk.prune(dense, base / "pruned", sparsity=0.3, data="random", onnx=True, eval_windows=1, **SHORT)
    more = {"onnx": False, "shared": True, "eval_windows": 1, **SHORT, "method": "wanda"}
    mptk.ladder(dense, base / "ladder", [0.2, 0.4], data="random", **more)
    return {name: base / name for name in ("dense", "pruned", "ladder")}


@pytest.fixture(params=FORMS)
def hostile(request, sound, tmp_path):
    """A copy of a published folder with planted code, beside which ``ran`` appears if the code runs."""
    folder = tmp_path / "hostile"
    shutil.copytree(sound["ladder" if request.param == "ladder" else "pruned"], folder)
    (folder / "e.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Own: ...\n")
    FORMS[request.param](folder)
    report = raw_report(folder)
    report["settings"][TRUE] = report[TRUE] = True
    report["settings"]["onnx"] = False  # so that rerun writes no graphs, which take time
    write_json(folder / "report.json", report)
    write_manifest(folder)
    merge(folder / "mptk.json", **{TRUE: True})
    return folder


# ---- every command, and every function ----

TEXT = ("--data", "random")
COMMANDS: dict[str, Callable[[Path, Path], tuple[object, ...]]] = {
    "analyze": lambda folder, out: (folder,),
    "advise": lambda folder, out: (folder, *TEXT, "--sparsities", "0.3", *FEW.split()),
    "bench": lambda folder, out: (folder, "--rounds", "2", "--lengths", "8"),
    "eval": lambda folder, out: (folder, *TEXT, "--length", "16", "--windows", "1"),
    "export": lambda folder, out: (folder, "--out", out),
    "generate": lambda folder, out: (folder, "a", "--max-new-tokens", "2"),
    "gguf": lambda folder, out: (folder, "--out", out.with_suffix(".gguf")),
    "prune": lambda folder, out: (folder, "--sparsity", "0.2", *TEXT, *QUICK.split(), "--out", out),
    "push": lambda folder, out: (folder, "someone/else", "--dry-run"),
    "recover": lambda folder, out: (folder, "--steps", "1", *TEXT, "--length", "16", "--no-onnx", "--out", out),
    "report": lambda folder, out: (folder, "--prompt", "a", "--html", out.with_suffix(".html")),
    "rerun": lambda folder, out: (folder, "--out", out),
    "rung": lambda folder, out: (folder, "0.4", "--out", out),
    "shapes": lambda folder, out: (folder, *TEXT, "--sparsity", "0.3", "--tokens", "0", *FEW.split()),
    "show": lambda folder, out: (folder,),
    "verify": lambda folder, out: (folder,),
}
"""Command → words that let it load the folder."""
READ_NO_FOLDER = {"features", "fetch", "models", "ops", "passes"}


@pytest.mark.usefixtures("quick_bench")
def test_no_command_runs_what_a_folder_brings(hostile, tmp_path):
    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    assert known == COMMANDS.keys() | READ_NO_FOLDER
    for name, words in COMMANDS.items():
        said = CliRunner().invoke(app, [name, *map(str, words(hostile, tmp_path / f"out-{name}"))])
        assert not (tmp_path / "ran").exists(), name
        assert said.exception is None or isinstance(said.exception, MptkError | SystemExit), (name, said.exception)


def opened(folder: Path) -> Pruned:
    return Pruned.open(folder)


def save_trained(folder: Path, out: Path) -> None:
    found = opened(folder)
    with torch.no_grad():
        next(found.model.parameters()).add_(0.01)
    found.save(out)


BEGUN: dict[str, Any] = {"progress": lambda stage, *_: stop_at("trace")(stage, 0, 0)}
"""What has loaded a model is stopped there: the command of the same name goes on."""
HOW: dict[str, Any] = {"data": "random", **BEGUN}
FUNCTIONS: dict[str, Callable[[Path, Path], object]] = {
    "Pruned": save_trained,
    "Report": lambda folder, out: mptk.prune(str(folder), out, mptk.Report.read(folder).settings, **BEGUN),
    "advise": lambda folder, out: mptk.advise(str(folder), sparsities=[0.3], samples=2, length=16, **HOW),
    "analyze": lambda folder, out: mptk.analyze(str(folder)),
    "bench": lambda folder, out: mptk.bench([str(folder)], lengths=[8], rounds=2),
    "evaluate": lambda folder, out: mptk.evaluate(opened(folder), "random", windows=1, length=16, progress=None),
    "export": lambda folder, out: mptk.export(opened(folder), out),
    "generate": lambda folder, out: mptk.generate(opened(folder), ["a"], max_new_tokens=2),
    "ladder": lambda folder, out: mptk.ladder(str(folder), out, [0.2, 0.4], onnx=False, **{**SHORT, **HOW}),
    "load": lambda folder, out: mptk.load(folder),
    "prune": lambda folder, out: mptk.prune(str(folder), out, onnx=False, **{**SHORT, **HOW}),
    "recover": lambda folder, out: mptk.recover(opened(folder), out, steps=1, length=16, onnx=False, **HOW),
    "rewrite": lambda folder, out: mptk.rewrite(mptk.analyze(str(folder)), mptk.Plan.load(folder / "plan.json")),
    "rung": lambda folder, out: mptk.rung(folder, 0.4).model,
    "shapes": lambda folder, out: mptk.shapes(str(folder), sparsity=0.3, search_tokens=0, **HOW),
    "show": lambda folder, out: mptk.show(str(folder)),
    "trace": lambda folder, out: mptk.trace(str(folder)),
    "verify": lambda folder, out: mptk.verify(folder),
}
LOAD_NO_FOLDER = {"FamilyPlan", "Plan", "Samples", "Settings", "__version__", "fetch", "rule"} | {
    name for name in mptk.__all__ if name.endswith("Error")
}


@pytest.mark.usefixtures("quick_bench")
def test_no_function_runs_what_a_folder_brings(hostile, tmp_path):
    assert set(mptk.__all__) == FUNCTIONS.keys() | LOAD_NO_FOLDER
    for name, call in FUNCTIONS.items():
        with suppress(MptkError, Stopped):
            call(hostile, tmp_path / f"out-{name}")
        assert not (tmp_path / "ran").exists(), name


# ---- the door ----


def test_the_word_is_in_no_file_and_in_no_copy(sound):
    for file in sound["pruned"].rglob("*"):
        if file.suffix in (".json", ".yaml", ".md"):
            assert TRUE not in file.read_text(), file
    said = trust_by_caller(True)
    assert said.allows_code
    assert deepcopy(mptk.Settings(trust_remote_code=True)).trust is said
    assert pickle.loads(pickle.dumps(said)) is NO_CODE  # noqa: S301  # its own
    for other in ("yes", 1, None):
        with pytest.raises(TypeError, match="must be a bool"):
            trust_by_caller(other)  # type: ignore[arg-type]
    with pytest.raises(MptkError, match="trust_remote_code"):
        mptk.Settings(trust_remote_code="yes")  # type: ignore[arg-type]


DOORS = {
    # The types of the public functions' keywords.
    "mptk/api/keywords.py": {"RecoverKeywords"},
    "mptk/features/advise/keywords.py": {"AdviseKeywords"},
    "mptk/features/width_search/keywords.py": {"ShapesKeywords"},
    "mptk/api/changed.py": {"write_again"},  # hands an earlier word on to a run
    "mptk/api/pruned.py": {"open"},
    "mptk/api/use.py": {"evaluate", "generate_continuations"},
    "mptk/run/describe.py": {"describe"},  # takes it away
    "mptk/cli/use.py": {"evaluate_models"},
    "mptk/config/recipe.py": {"format_command"},  # prints what the caller may type again
    "mptk/config/settings.py": {"CoreSettings", "trust"},
    "mptk/features/ladder/api.py": {"ladder", "rung"},
    "mptk/features/rerun/api.py": {"repeat_run"},
    "mptk/io/models.py": {"load"},
    "mptk/proof/verification.py": {"verify"},
}
"""File → what reads or sets the caller's word. Everything else takes a ``Trust``."""


class Words(ast.NodeVisitor):
    """Collects the functions and classes of a file that read, set or make the caller's word, and other libraries'."""

    def __init__(self, file: Path) -> None:
        self.within: list[str] = []
        self.found: set[str] = set()
        self.given: list[str] = []
        self.visit(ast.parse(file.read_text()))

    def visit(self, node: ast.AST) -> None:
        named = {getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "arg", "")}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.within.append(node.name)
            self.generic_visit(node)
            self.within.pop()
            return
        if isinstance(node, ast.Call) and "from_" in ast.unparse(node.func):
            self.given += [ast.unparse(each.value) for each in node.keywords if each.arg == TRUE]
        elif (isinstance(node, ast.Call) and any(each.arg == TRUE for each in node.keywords)) or (
            not isinstance(node, ast.keyword) and named & {TRUE, "trust_by_caller"}
        ):
            self.found.add(self.within[-1])
        self.generic_visit(node)


def test_only_the_callers_keyword_and_option_make_the_word():
    words = {file: Words(file) for package in ("mptk", "passes") for file in (ROOT / package).rglob("*.py")}
    assert {file.relative_to(ROOT).as_posix(): each.found for file, each in words.items() if each.found} == DOORS
    assert all(given.endswith(".allows_code") for each in words.values() for given in each.given)


# ---- what is no class, and code all the same ----


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_names_no_kernel_of_a_hub(name, tmp_path):
    testing.save_word_model(testing.make_llama(), tmp_path / "model")
    merge(tmp_path / "model" / "config.json", **{name: "someone/attention"})
    assert "someone/attention" in (said := refused("analyze", tmp_path / "model"))
    assert "remove" in said
