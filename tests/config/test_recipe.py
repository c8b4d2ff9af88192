"""Recipes: every option a key, the command line wins, each run writes its own.

It reaches for mptk.config.recipe: a recipe is read without a run.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import mptk as api
from mptk.cli import prune as commands
from mptk.cli.main import app
from mptk.config import Learning, LossWeights, Training, find_settings, list_refused, read_recipe
from mptk.config.recipe import build_recipe
from mptk.errors import InputError, MptkError, OutputError
from mptk.publish.manifest import hash_weight_files

ONLY_TEXT = Training(losses=LossWeights(lm=0.5))
OTHER = api.Settings(
    sparsity=0.4,
    method="wanda",
    data="a.jsonl=0.7,b=0.3",
    families=("ffn", "heads"),
    widths={"ffn": 64, "heads": 3},
    quantize=("int8", "int4"),
    onnx=False,
    reconstruct=False,
    memory=8_000_000_001,
    max_shard_size=5000,
    rehome=True,
    learning=Learning(7, precision="no", teacher="cached", gradient_checkpointing=True, training=ONLY_TEXT),
)


@pytest.fixture
def asked(asked_prune, tmp_path, go_to):
    """Collects what `prune` is asked for, in place of a run, in a folder with the data that recipes here name."""
    go_to(tmp_path)
    for name in ("a.jsonl", "a.txt", "b.txt"):
        (tmp_path / name).write_text('{"text": "text"}\n')
    return asked_prune


def write(path: Path, **values: object) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300"})


def check_refusal(kind: type[MptkError], name: str, *arguments: str) -> None:
    refused = run(*arguments).exception
    assert isinstance(refused, kind), repr(refused)
    assert Path(refused.name).name == name


@pytest.mark.parametrize("settings", [api.Settings(), OTHER], ids=["defaults", "others"])
def test_the_recipe_of_settings_gives_these_settings(settings, tmp_path, asked):
    path = write(tmp_path / "run.yaml", **build_recipe("minilm", settings))
    result = run("prune", "--config", path, "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, (result.output, result.exception)
    ((model, out, found),) = asked
    assert (model, out) == ("minilm", tmp_path / "out")
    assert found == settings


def test_the_command_line_wins(tmp_path, asked):
    path = write(tmp_path / "a.yaml", model="minilm", sparsity=0.5, steps=9, onnx=False, seed=3, width={"ffn": 32})
    assert run("prune", "gemma3-270m", "--config", path, "--sparsity", "0.2", "--onnx", "--out", "p").exit_code == 0
    ((model, out, settings),) = asked
    assert (model, str(out), settings.sparsity, settings.onnx) == ("gemma3-270m", "p", 0.2, True)
    assert (settings.steps, settings.seed, settings.widths) == (9, 3, {"ffn": 32})


def test_latencies_dashes_and_a_bare_no(tmp_path, asked):
    (tmp_path / "a.yaml").write_text("model: minilm\nmax-decode-ms: 12.5\nprecision: no\ndata: {a.txt: 1, b.txt: 3}\n")
    assert run("prune", "--config", str(tmp_path / "a.yaml"), "--out", "o").exit_code == 0
    settings = asked[0][2]
    assert (settings.max_ms, settings.budget, settings.learning.precision) == (12.5, "latency", "no")
    assert settings.data == "a.txt=1,b.txt=3"
    again = write(tmp_path / "b.yaml", **build_recipe("minilm", settings))
    assert run("prune", "--config", again, "--out", "o").exit_code == 0
    assert asked[1][2] == settings


def test_a_recipe_names_no_other(tmp_path):
    """Other faults: tests/bad_inputs/plans.py."""
    path = write(tmp_path / "a.yaml", config="other.yaml")
    check_refusal(InputError, "config", "prune", "minilm", "--out", "o", "--config", path)


@pytest.mark.features
def test_every_option_is_a_key_of_the_recipe():
    learning = replace(OTHER.learning, teacher_cache="cache", mask_share=0.3, rank=8)
    learning = replace(learning, training=replace(learning.training, lr=0.1))
    full = replace(OTHER, plan="plan.json", eval_data="c", vocabulary="d", kv_heads=1, learning=learning)
    full = replace(full, samples=4, context=64, search_tokens=0, distil_epochs=0)
    read = api.Settings(inputs="i.safetensors", larger="runs/a")  # which has no vocabulary, and data of its own kind
    never = {"resume", "minutes", *list_refused(api.Settings)}  # minutes: a run writes what they chose
    assert set(find_settings(api.Settings, "prune")) - never == set(
        build_recipe("minilm", full) | build_recipe("minilm", read)
    ) - {"model"}
    assert set(find_settings(api.Settings, "recover")) - never == set(build_recipe("minilm", full, "recover")) - {
        "model"
    }
    assert "config" in inspect.signature(commands.prune_to_folder).parameters


@pytest.mark.parametrize("name", ["trust_remote_code", "trust-remote-code", "overwrite", "teacher_cache"])
def test_what_no_file_may_decide(name, tmp_path, asked):
    (tmp_path / "a.yaml").write_text(f"model: minilm\nteacher: cached\nsteps: 2\n{name}: true\n")
    arguments = ["prune", "--config", str(tmp_path / "a.yaml"), "--out", "o"]
    check_refusal(InputError, name.replace("-", "_"), *arguments)
    assert asked == []


@pytest.mark.parametrize("out", ["/tmp/elsewhere", "../beside", ".", "inside/../../beside", "link/o"])
def test_a_recipe_writes_only_below_the_current_folder(out, tmp_path, asked):
    (tmp_path / "link").symlink_to(tmp_path.parent)
    check_refusal(InputError, "out", "prune", "--config", write(tmp_path / "a.yaml", model="minilm", out=out))
    assert asked == []
    assert run("prune", "--config", write(tmp_path / "b.yaml", model="minilm", out="runs/a")).exit_code == 0
    assert asked[0][1] == Path("runs/a")


# ---- real runs ----


def test_each_run_writes_its_recipe(laboratory):
    made = laboratory.open_pruned()
    written = read_recipe(made / "run.yaml")
    assert (written["model"], written["data"]) == (str(laboratory.open_model()), str(laboratory.open_data()))
    assert (written["method"], written["onnx"]) == ("wanda", True)
    assert "run.yaml" in json.loads((made / "report.json").read_text())["files"]
    assert not written.keys() & list_refused(api.Settings)


def test_a_recipe_repeats_its_run_beside_files_of_the_user(laboratory, tmp_path):
    first = laboratory.open_recovered()
    assert read_recipe(first / "run.yaml")["folder"] == str(laboratory.open_pruned())
    out = laboratory.copy(first, tmp_path / "out")
    (out / "NOTES.txt").write_text("mine")
    again = ["recover", "--config", str(first / "run.yaml"), "--out", str(out)]
    check_refusal(OutputError, "out", *again)
    before = (out / "report.json").stat().st_mtime_ns  # an inode number is given again to the next file
    result = run(*again, "--overwrite")
    assert result.exit_code == 0, repr(result.exception)
    assert (out / "NOTES.txt").read_text() == "mine"
    assert (out / "report.json").stat().st_mtime_ns != before
    assert hash_weight_files(out) == hash_weight_files(first)
