"""Forms of models beside checkpoint folders: which loader has one, and what is said if no feature has it.

It reaches for mptk.io.loaders: a loader is a feature's, not a user's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from mptk import MptkError, Report
from mptk.errors import FileError, ModelError
from mptk.io import Loader, models
from mptk.io.loaders import PLAIN_CHECKPOINTS, choose_loader, list_loaders
from mptk.testing import expect_error

Bring = Callable[[Mapping[str, Loader]], None]


@pytest.fixture
def bring(inside):
    """Says which loaders the installed packages have."""
    return lambda loaders: inside.gives("mptk.io.loaders.load_parts", loaders)


def write_config(folder: Path, **fields: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


class Low(Loader):
    endings = (".low", ".both")

    def takes(self, folder: Path) -> bool:
        return folder.name == "both"


class High(Low):
    priority = 1
    endings = (".high", ".both")


def test_of_two_that_take_a_model_the_one_with_the_higher_priority_has_it(bring, tmp_path):
    bring({"low": Low(), "high": High()})
    (tmp_path / "both").mkdir()
    for place in (tmp_path / "both", tmp_path / "A.Both"):
        assert isinstance(choose_loader(place), High)
    assert choose_loader(tmp_path) is choose_loader(tmp_path / "none") is PLAIN_CHECKPOINTS
    (tmp_path / "text").touch()
    with expect_error(FileError, name=tmp_path / "text"):
        models.load(str(tmp_path / "text"))


@pytest.mark.features
def test_a_part_of_a_pipeline_is_not_a_quantised_checkpoint(tmp_path):
    pytest.importorskip("diffusers")
    both = write_config(tmp_path / "both", _class_name="UNet2DModel", quantization_config={"quant_method": "gptq"})
    assert choose_loader(both).library == "diffusers"
    with expect_error(ModelError, name=both):
        models.load(str(both))


@pytest.mark.features
def test_every_loader_leaves_a_plain_checkpoint_to_transformers(laboratory):
    assert len(list_loaders()) >= 4
    assert choose_loader(laboratory.open_model()) is PLAIN_CHECKPOINTS


class Named(Loader):
    """Knows the name ``alias``, of a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def takes_name(self, name: str) -> bool:
        return name == "alias"

    def fetch(self, name: str) -> Path:
        return self.file


def test_what_no_feature_reads_is_refused_by_name(bring, laboratory, tmp_path):
    file = tmp_path / "toy.gguf"
    file.write_bytes(b"GGUF")
    bring({"names": Named(file)})
    quantized = laboratory.copy(laboratory.open_model(), tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").unlink()
    (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    (tmp_path / "empty").mkdir()
    refused: dict[str, type[MptkError]] = {
        str(file): ModelError,
        "smollm2-135m": FileError,  # an alias of the feature ``packaged``
        str(quantized): ModelError,
        str(write_config(tmp_path / "unet", _class_name="UNet2DModel")): ModelError,
        str(tmp_path / "empty"): FileError,
    }
    for model, kind in refused.items():
        with expect_error(kind, name=model):
            models.load(model)
    with expect_error(ModelError, name=file):
        models.load("alias")
    with expect_error(FileError, name="smollm2-135m"):
        Report.read("smollm2-135m")


def test_without_features_a_plain_checkpoint_is_loaded(bring, laboratory):
    bring({})
    assert models.load(str(laboratory.open_model())).path == laboratory.open_model()
