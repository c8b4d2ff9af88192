"""Features are folders: whole, named by entry points only, and each can be taken away and put back by moving it.

The tree without ``mptk/features`` is a copy, which comes first on the path of processes of its own.
"""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import tomllib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path

import pytest
from fresh import COMMAND, Done

from mptk import testing
from mptk.config import CoreSettings
from mptk.config.choices import METHODS, TARGET_CHOICES
from mptk.errors import PackageError
from mptk.methods import MASKPRUNE, find_method, list_methods
from mptk.plugins import Feature, list_features, load_parts
from mptk.targets import STOCK_TARGET, list_targets
from mptk.testing import expect_error

NOT_PARTS = ("name", "summary", "page", "settings", "commands", "options", "subfolders")
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path.parent.name for path in (ROOT / "mptk" / "features").glob("*/__init__.py"))
PARTS = tuple(each.name for each in fields(Feature) if each.name not in NOT_PARTS)
Run = Callable[..., Done]


def test_each_folder_is_named_by_an_entry_point_and_by_nothing_else():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["entry-points"]["mptk.features"]
    assert named == {name: f"mptk.features.{name}:FEATURE" for name in FOLDERS}
    assert list(list_features()) == [each.name for each in list_features().values()] == FOLDERS


@pytest.mark.parametrize("kind", PARTS)
def test_what_features_name_is_there(kind):
    assert all(part is not None for part in load_parts(kind).values())


@pytest.mark.parametrize("name", FOLDERS)
def test_a_feature_says_what_it_is_for_and_where_that_is_described(name):
    module = importlib.import_module(f"mptk.features.{name}")
    feature: Feature = module.FEATURE
    said = inspect.getdoc(module) or ""
    assert len(said.splitlines()) >= 3, f"{name}: what is it for, for whom, and how does one use it?"
    assert feature.page in said, f"{name} names its page of the documentation"
    assert (ROOT / feature.page).is_file()
    assert (ROOT / "tests" / "features" / name).is_dir(), f"tests of {name} are in a folder of their own"


@pytest.mark.parametrize("feature", [each for each in list_features().values() if each.settings], ids=lambda f: f.name)
def test_settings_of_a_feature_stand_below_one_of_the_core(feature):
    core = {each.name for each in fields(CoreSettings)}
    assert feature.settings is not None
    for each in fields(feature.settings):
        if each.name not in core:
            after = next(iter(each.metadata.values())).after
            assert after.partition(".")[0] in core | {other.name for other in fields(feature.settings)}, each.name


# ---- names that two bring ----


def bring(package: str = "mine", /, name: str = "mine", **parts: dict[str, str]) -> AbstractContextManager[None]:
    """Install a feature that exists only here, beside mptk's own."""
    return testing.install_plugin({"mptk.features": {name: Feature(name, "", **parts)}}, package=package)


def test_a_feature_adds_a_method_and_a_target():
    with bring(methods={"mine": "mptk.methods:MASKPRUNE"}, targets={"other": "mptk.targets:STOCK_TARGET"}):
        assert find_method("mine") is MASKPRUNE
        assert list(list_targets())[-1] == "graph"
        assert list_targets()["other"] is STOCK_TARGET
        assert METHODS.explain_wrong("mine") is None
        assert TARGET_CHOICES.explain_wrong("other") is None
    assert "mine" not in list_methods()


def test_no_feature_replaces_what_another_or_the_core_brings():
    for kind, name, list_named, refused in (
        ("targets", "nemotron-nas", list_targets, "nemotron_nas"),
        ("targets", "stock", list_targets, "mine"),
        ("methods", "wanda", list_methods, "mine"),
    ):
        with bring(**{kind: {name: "mptk.targets:ONNX"}}), expect_error(PackageError, name=refused):
            list_named()


def test_two_packages_with_a_feature_of_one_name_are_refused():
    with bring("one", "same"), bring("two", "same"), expect_error(PackageError, name="same"):
        list_features()
    with bring("one", "same"), bring("one", "same"):
        assert "same" in list_features()  # the same package twice on the path


# ---- a tree with fewer folders ----


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the product without its features."""
    made = tmp_path_factory.mktemp("tree")
    for package in ("mptk", "passes"):
        shutil.copytree(ROOT / package, made / package, ignore=shutil.ignore_patterns("features", "__pycache__"))
    return made


@pytest.fixture
def run(tree, fresh):
    """Run a program, or a command line of mptk, on the copy."""

    def run(*words: object, code: str = COMMAND) -> Done:
        return fresh.run(code, *words, paths=[tree])

    return run


CORE = """
import json, sys, torch, mptk
from pathlib import Path
from torch import nn

decoder, encoder, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
asked = dict(method="wanda", sparsity=0.25, tolerance=0.1, samples=4, length=32, eval_windows=2, eval_length=32, align=4, progress=None)
text = ["the quick brown fox jumps over the lazy dog while seven wizards quietly mix pale blue jars of honey"] * 40
net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
made = [
    mptk.prune(decoder, out / "decoder", data=text, onnx=True, **asked),
    mptk.prune(encoder, out / "encoder", data=text, onnx=False, **asked),
    mptk.prune(net, out / "module", example_inputs=(torch.randn(8, 16),), onnx=False, **asked),
]
mptk.verify(out / "encoder")
costs = [each.report.cost for each in made]
print(json.dumps([cost["pruned"]["parameters"] < cost["dense"]["parameters"] for cost in costs]))
"""


def test_the_core_stands_by_itself(run, tmp_path):
    decoder = testing.save_model(testing.make_llama(layers=1), tmp_path / "decoder")
    encoder = testing.save_model(testing.MODEL_KINDS["encoder"].make(), tmp_path / "encoder")
    done = run(decoder, encoder, tmp_path / "out", code=CORE)
    assert done.code == 0, done.err[-3000:]
    assert json.loads(done.out.splitlines()[-1]) == [True, True, True]
    assert (tmp_path / "out" / "encoder" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "decoder" / "onnx" / "model.onnx").is_file()


LINES = """
import sys
from mptk.cli.main import main
for line in (["prune", "model", "--kv-heads", "1"], ["advise", "model"], ["features"]):
    sys.argv[1:] = line
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code
    print("code", code, flush=True)
import mptk
mptk.prune("x", kv_heads=1)
"""


def test_what_is_not_installed_is_said_in_one_sentence(run):
    done = run(code=LINES)
    assert [line for line in done.out.splitlines() if line.startswith("code")] == ["code 2", "code 2", "code 0"]
    said = done.err.replace("\n", " ")
    assert "No such option: --kv-heads" in said
    assert said.count("not installed here are the features advise") == 3, "of two commands and of a call"
    assert "kv_heads" in done.out


def test_a_feature_is_taken_away_and_put_back_by_moving_its_folder(run, tree):
    place = tree / "mptk" / "features"
    (tree / "taken").mkdir()
    place.mkdir()
    try:
        shutil.copy(ROOT / "mptk" / "features" / "__init__.py", place)
        assert "--kv-heads" not in run("prune", "--help").out
        shutil.copytree(ROOT / "mptk" / "features" / "kv_heads", place / "kv_heads")
        assert "--kv-heads" in run("prune", "--help").out
        assert [each["name"] for each in json.loads(run("features", "--json", "-").out)["features"]] == ["kv_heads"]
        shutil.move(place / "kv_heads", tree / "taken")
        assert "--kv-heads" not in run("prune", "--help").out
        shutil.move(tree / "taken" / "kv_heads", place)
        assert "--kv-heads" in run("prune", "--help").out
    finally:
        shutil.rmtree(place)
