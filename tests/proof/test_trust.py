"""A folder is data: nothing in it makes mptk run code, fetch something, or load another model than the user means."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lab import raw_report

import mptk
from mptk import ChangedError, FileError, InputError, ProofError, Report
from mptk.files import write_json
from mptk.io import models
from mptk.publish.manifest import write_manifest
from mptk.testing import expect_error, make_decoder, save_word_model

SETTINGS = mptk.Settings(
    method="magnitude", widths={"ffn": 64}, families=("ffn",), samples=2, length=16, onnx=False, eval_length=16, align=8
)
CONFIG = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODEL = """
from pathlib import Path

from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

Path(RAN).touch()


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        touched = Path(RAN).with_name("touched")
        if touched.exists():
            Path(touched.read_text()).touch()
"""

pytestmark = pytest.mark.usefixtures("own_modules")


def edit(folder: Path, **changes: object) -> None:
    """Change the report and make the manifest fit, as whoever sends a folder could."""
    write_json(folder / "report.json", {**raw_report(folder), **changes})
    write_manifest(folder)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A model with its own class, whose code leaves a file ``ran``, and one that a file ``touched`` beside it names."""
    folder = tmp_path_factory.mktemp("own")
    save_word_model(make_decoder("llama", num_hidden_layers=1), folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own_llama", "auto_map": code, "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_own.py").write_text(CONFIG)
    (folder / "modeling_own.py").write_text(MODEL.replace("RAN", repr(str(folder.parent / "ran"))))
    return folder


@pytest.fixture(scope="module")
def own_pruned(own, tmp_path_factory):
    out = tmp_path_factory.mktemp("own-pruned") / "out"
    with expect_error(InputError, name="trust_remote_code"):
        mptk.prune(str(own), out, SETTINGS)
    assert not (own.parent / "ran").exists()
    mptk.prune(str(own), out, SETTINGS, trust_remote_code=True)
    return out


@pytest.fixture
def copy(own_pruned, tmp_path):
    return shutil.copytree(own_pruned, tmp_path / "copy")


def test_a_model_of_its_own_class_is_pruned_proven_and_loads(own_pruned):
    assert {"modeling_own.py", "configuration_own.py"} <= set(Report.read(own_pruned).files)
    model = models.load(str(own_pruned), trust_remote_code=True).model
    assert type(model).__name__ == "OwnForCausalLM"
    assert model.config.intermediate_size == 64
    assert all(d.ok for d in mptk.verify(own_pruned, trust_remote_code=True))


@pytest.mark.parametrize("name", ["extra.txt", "plan.json", "mptk.json"])
def test_a_folder_that_is_changed_while_it_is_verified_is_no_failed_proof(name, own, copy):
    """The dense model's own code touches a file. The error says what happened, and to verify the folder again."""
    (own.parent / "touched").write_text(str(copy / name))
    with expect_error(ChangedError, name=copy):
        mptk.verify(copy, trust_remote_code=True)
    (own.parent / "touched").unlink()


def test_a_folder_cannot_trust_itself(own, own_pruned, tmp_path):
    assert "trust_remote_code" not in raw_report(own_pruned)["settings"]
    (own.parent / "ran").unlink(missing_ok=True)
    for run in (lambda: mptk.verify(own_pruned), lambda: mptk.recover(own_pruned, tmp_path / "out", steps=2)):
        with expect_error(InputError, name="trust_remote_code"):
            run()
    assert not (own.parent / "ran").exists()


def test_code_that_is_not_the_dense_models_is_not_run_even_if_that_is_trusted(copy, tmp_path):
    with (copy / "modeling_own.py").open("a") as file:
        file.write(f"\nPath({str(tmp_path / 'evil')!r}).touch()\n")
    write_manifest(copy)
    with expect_error(ProofError, name="config"):
        mptk.verify(copy, trust_remote_code=True)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_another_repository_is_not_fetched(copy, name):
    code = {"AutoConfig": "evil/repo--own.OwnConfig", "AutoTokenizer": [None, "evil/repo--own.OwnTokenizer"]}
    write_json(copy / name, json.loads((copy / name).read_text()) | {"auto_map": code})
    write_manifest(copy)
    with expect_error(ProofError, name="config"):
        mptk.verify(copy, trust_remote_code=True)


def test_recover_of_a_model_of_its_own_class(own_pruned, tmp_path):
    how = {"steps": 2, "rank": 2, "batch": 2, "micro": 2, "length": 16, "eval_length": 16, "onnx": False}
    found = mptk.recover(own_pruned, tmp_path / "out", trust_remote_code=True, **how)
    assert "trained model" in [d["stage"] for d in found.report.proof]


@pytest.mark.parametrize(
    ("named", "kind", "about"),
    [
        ("someone/a-model", FileError, "someone/a-model"),
        ("smollm2-135m", FileError, "smollm2-135m"),
        ("OTHER", InputError, "model"),
        ("MOVED", FileError, "MOVED"),
    ],
)
def test_what_the_report_names_is_neither_fetched_nor_believed(laboratory, tmp_path, set_cache, named, kind, about):
    other, copy = tmp_path / "OTHER", tmp_path / "copy"
    shutil.copytree(laboratory.open_model(), other)
    (other / "generation_config.json").write_text("{}")
    shutil.copytree(laboratory.open_pruned(), copy)
    set_cache(tmp_path / "cache")
    edit(copy, model=str(tmp_path / named) if named.isupper() else named)
    for run in (lambda: mptk.verify(copy), lambda: mptk.recover(copy, tmp_path / "out", steps=2)):
        with expect_error(kind, name=tmp_path / about if about.isupper() else about):
            run()
    assert not (tmp_path / "cache").exists()


def test_a_dense_model_that_moved_is_named_by_the_user(laboratory, tmp_path):
    pruned = tmp_path / "pruned"
    mptk.prune(str(laboratory.open_model()), pruned, SETTINGS)
    assert Path(Report.read(pruned).model).is_absolute()
    edit(pruned, model="/nowhere/at/all")
    with expect_error(FileError, name="/nowhere/at/all"):
        mptk.verify(pruned)
    assert mptk.verify(pruned, model=str(laboratory.copy(laboratory.open_model(), tmp_path / "moved")))
    with expect_error(InputError, name="model"):
        mptk.verify(pruned, model=str(laboratory.open_pruned()))


@pytest.mark.parametrize(("given", "told"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")])
def test_a_command_leaves_no_record_of_its_use(given, told, tmp_path):
    """ONNX Runtime keeps one in the home folder before it sends it, unless it is told not to; a user may let it.

    Whether it keeps one if it may is its own affair: it keeps none where it finds a continuous-integration service.
    """
    code = "import os, sys; sys.argv = ['mptk', '--version']\nfrom mptk.cli.main import main\ntry: main()\nexcept SystemExit: pass"
    code += "\nimport onnxruntime" * (told == "1") + "\nprint(os.environ['ORT_DISABLE_TELEMETRY'])"
    own = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")}
    environment = own | given | {"HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert run.stdout.split()[-1] == told
    if told == "1":
        assert not any("Microsoft" in str(path) for path in tmp_path.rglob("*"))
