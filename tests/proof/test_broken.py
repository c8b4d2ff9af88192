"""Broken folders that ``verify`` must refuse: some rows of ``tests/broken``, whose command runs all."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from lab import remembered

from tests.broken import Broken, Published, check, named
from tests.broken import files as side_files

FILES_SAID = {
    "config: weights in 4 bits": 'quantization_config.quant_method of config.json is "bitsandbytes", but missing',
    "config: a second field of that name": "config.json has hidden_act twice",
    "generation: code": 'custom_generate of generation_config.json is "a/b", but missing',
    "planted: modules.json": "modules.json is not a file that mptk writes for this model",
    "planted: a graph of another scheme": "onnx/model_bnb4.onnx is not a file that mptk writes for this model",
    "planted: LICENSE": "LICENSE is not a file that mptk writes for this model",
    "weights: a tensor more": "extra is a tensor too many in model.safetensors",
    "weights: more metadata": 'quantization of the header of model.safetensors is "fp8", but missing',
    "config: version of the writer": "versions.transformers in report.json is wrong",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    with remembered():
        yield side_files.publish(side_files.KIND, tmp_path_factory.mktemp("files"))


QUICK = (*FILES_SAID,)[:5]


@pytest.mark.features
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in FILES_SAID]
)
def test_verify_refuses_a_file_that_mptk_does_not_write(folder: Published, name: str) -> None:
    by = check(named(side_files.ROWS, side_files.KIND)[name], folder)
    assert FILES_SAID[name] in by
    assert "\n" not in by


def test_a_row_that_changes_nothing_is_an_error(folder: Published) -> None:
    with pytest.raises(ValueError, match="the damage changes nothing"):
        check(Broken(side_files.KIND, "nothing", lambda place: None), folder)


@pytest.mark.features
def test_a_models_name_is_no_folder(typed: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    for words, makes in ((("verify", "smollm2-135m"), "prune"), (("generate", "smollm2-135m", "Once"), "export")):
        assert typed(*words) == 1
        said = f"smollm2-135m is a model's name, and here a folder is needed; `mptk {makes} smollm2-135m --out DIR` "
        assert said in capsys.readouterr().err.replace("\n", " ")
