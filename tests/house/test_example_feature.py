"""examples/feature, installed: its loader, setting, row and command work beside mptk's."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from fresh import Fresh

from mptk import Report, testing

PRUNE = "--method magnitude --samples 4 --length 32 --align 4 --no-onnx --families ffn --width ffn=32 --eval-windows 2"


def run(fresh: Fresh, site: Path, *words: object) -> str:
    done = fresh.command(*words, paths=[site])
    assert done.code == 0, done.err
    return done.out


def test_a_feature_of_another_package(fresh, site, tmp_path):
    dense = Path(testing.save_model(testing.make_llama(), tmp_path / "dense"))
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for file in dense.iterdir():
            archive.write(file, file.name)
    found = json.loads(run(fresh, site, "features", "--json", "-"))["features"]
    (zipped,) = (each for each in found if each["name"] == "zipped")
    assert (zipped["of"], zipped["commands"], zipped["options"]) == ("mptk-zipped 0.1.0", ["labels"], ["--label"])
    assert {each["of"].split()[0] for each in found} == {"mptk", "mptk-zipped"}

    text = tmp_path / "text.txt"
    text.write_text(testing.SENTENCES * 40)
    out = tmp_path / "out"
    words = ("prune", tmp_path / "model.zip", "--label", "first", "--data", text, *PRUNE.split(), "--out", out)
    run(fresh, site, *words)
    assert run(fresh, site, "labels", out) == f"{out}: first\n"
    # Without the feature the folder is read as before, and its row is kept.
    assert Report.read(out).rows == {"label": {"text": "first"}}
