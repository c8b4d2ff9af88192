"""Forms of models beside checkpoint folders: which loader has one, and what is said if no feature has it.

It reaches for mptk.io.loaders: a loader is a feature's, not a user's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import refused
from inside import Inside

from mptk import MptkError, Report, testing
from mptk.io import Loader, models
from mptk.io.loaders import PLAIN_CHECKPOINTS, choose_loader, list_loaders


@pytest.fixture
def _without_features(inside: Inside) -> None:
    inside.gives("mptk.io.loaders.load_parts", {})


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


def test_of_two_that_take_a_model_the_one_with_the_higher_priority_has_it(inside: Inside, tmp_path: Path) -> None:
    inside.gives("mptk.io.loaders.load_parts", {"low": Low(), "high": High()})
    (tmp_path / "both").mkdir()
    for place in (tmp_path / "both", tmp_path / "A.Both"):
        assert isinstance(choose_loader(place), High)
    assert choose_loader(tmp_path) is choose_loader(tmp_path / "none") is PLAIN_CHECKPOINTS
    (tmp_path / "text").touch()
    with pytest.raises(MptkError, match=r"neither a checkpoint folder nor a \.high file nor a .*; give one of these"):
        models.load(str(tmp_path / "text"))


@pytest.mark.features
def test_a_part_of_a_pipeline_is_not_a_quantised_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    both = write_config(tmp_path / "both", _class_name="UNet2DModel", quantization_config={"quant_method": "gptq"})
    assert choose_loader(both).library == "diffusers"
    assert "give the float model of diffusers" in refused("analyze", both)


@pytest.mark.features
def test_every_loader_leaves_a_plain_checkpoint_to_transformers(tmp_path: Path) -> None:
    assert len(list_loaders()) >= 4
    testing.save_word_model(testing.make_llama(), tmp_path / "plain")
    assert choose_loader(tmp_path / "plain") is PLAIN_CHECKPOINTS


@pytest.mark.usefixtures("_without_features")
class TestWithoutFeatures:
    def test_a_plain_checkpoint_is_loaded(self, tmp_path: Path) -> None:
        testing.save_word_model(testing.make_llama(), tmp_path / "plain")
        assert models.load(str(tmp_path / "plain")).path == tmp_path / "plain"

    @pytest.mark.parametrize("name", ["toy.gguf", "toy.other"])
    def test_a_file(self, name: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(b"GGUF")
        said = f"{name}: no installed feature reads this; give a transformers checkpoint folder"
        assert said in refused("analyze", tmp_path / name)

    def test_the_file_of_a_name(self, inside: Inside, tmp_path: Path) -> None:
        class Names(Loader):
            def takes_name(self, name: str) -> bool:
                return name == "alias"

            def fetch(self, name: str) -> Path:
                return tmp_path / "toy.gguf"

        (tmp_path / "toy.gguf").write_bytes(b"GGUF")
        inside.gives("mptk.io.loaders.load_parts", {"names": Names()})
        assert "toy.gguf: no installed feature reads this" in refused("analyze", "alias")

    def test_a_name(self, inside: Inside) -> None:
        inside.bound("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert "'smollm2-135m' is no local folder, and the hub does not provide it: " in refused(
            "analyze", "smollm2-135m"
        )
        with pytest.raises(MptkError, match="no report"):
            Report.read("smollm2-135m")

    def test_a_quantised_checkpoint(self, tmp_path: Path) -> None:
        testing.save_word_model(testing.make_llama(), tmp_path / "model")
        config = json.loads((tmp_path / "model/config.json").read_text())
        (tmp_path / "model/config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
        with pytest.raises(MptkError, match="is quantised, and no installed feature reads that; give the float"):
            models.load(str(tmp_path / "model"))

    def test_a_part_of_a_pipeline(self, tmp_path: Path) -> None:
        part = write_config(tmp_path / "unet", _class_name="UNet2DModel")
        assert "transformers cannot load" in refused("analyze", part)

    def test_a_folder_without_a_config(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        said = "has no config.json; give a transformers checkpoint folder 0 s trace"
        assert said in refused("analyze", tmp_path / "empty")
