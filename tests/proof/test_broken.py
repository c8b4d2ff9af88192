"""Side files that ``verify`` must refuse: some rows of ``tests/broken``, whose command runs all."""

from __future__ import annotations

import pytest

from mptk import FileError, MptkError, ProofError, Report
from mptk.proof.claims import check_files
from mptk.proof.verification import check_planted
from mptk.targets import ONNX, STOCK_TARGET
from mptk.testing import expect_error
from tests.broken import Broken, make_broken, named
from tests.broken import files as side_files

ROWS = named(side_files.ROWS, side_files.KIND)
REFUSED: dict[str, tuple[type[MptkError], str]] = {
    "config: weights in 4 bits": (ProofError, "config"),
    "config: a second field of that name": (ProofError, "config.json"),
    "config: version of the writer": (FileError, "versions.transformers"),
    "generation: code": (ProofError, "config"),
    "planted: modules.json": (ProofError, "modules.json"),
    "planted: a graph of another scheme": (ProofError, "onnx/model_bnb4.onnx"),
    "planted: LICENSE": (ProofError, "LICENSE"),
    "weights: a tensor more": (ProofError, "config"),
    "weights: more metadata": (ProofError, "config"),
}


@pytest.mark.always
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_mptk_does_not_write(lab, name):
    kind, about = REFUSED[name]
    with make_broken(ROWS[name], lab.folder) as copy, expect_error(kind, name=about):
        check_files(Report.read(copy), copy)
        lab.prove(copy, None, STOCK_TARGET)
        check_planted(lab.compiled, (STOCK_TARGET, ONNX), copy)


def test_verify_refuses_it(lab):
    with make_broken(ROWS["planted: LICENSE"], lab.folder) as copy, expect_error(ProofError, name="LICENSE"):
        lab.verify(copy)


def test_a_row_that_changes_nothing_is_an_error(lab):
    nothing = make_broken(Broken(side_files.KIND, "nothing", lambda place: None), lab.folder)
    with pytest.raises(ValueError, match="the damage changes nothing"), nothing:
        pass


@pytest.mark.features
@pytest.mark.parametrize("command", [("verify", "smollm2-135m"), ("generate", "smollm2-135m", "Once")])
def test_a_models_name_is_no_folder(run_words, command):
    assert run_words(*command) == 1
