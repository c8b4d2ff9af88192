"""examples/feature, installed in an environment of its own: its loader, setting, row and command work beside mptk's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mptk import Report, testing

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "feature"
PRUNE = "--method magnitude --samples 4 --length 32 --align 4 --no-onnx --families ffn --width ffn=32 --eval-windows 2"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that sees this one's packages, and the example."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    (site,) = place.glob("lib/python*/site-packages")
    (site / "beside.pth").write_text("\n".join(each for each in sys.path if Path(each).is_dir()))
    source = tmp_path_factory.mktemp("source") / "feature"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(source)], check=True)
    return place / "bin" / "python"


def run(python: Path, *words: object, cache: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"MPTK_CACHE": str(cache), "COLUMNS": "200"}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from mptk.cli.main import main; main()"
    done = subprocess.run(
        [python, "-c", code, *map(str, words)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_feature_of_another_package(python: Path, tmp_path: Path) -> None:
    dense = Path(testing.save_model(testing.make_llama(), tmp_path / "dense"))
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for file in dense.iterdir():
            archive.write(file, file.name)
    found = json.loads(run(python, "features", "--json", "-", cache=tmp_path))["features"]
    (zipped,) = (each for each in found if each["name"] == "zipped")
    assert (zipped["of"], zipped["commands"], zipped["options"]) == ("mptk-zipped 0.1.0", ["labels"], ["--label"])
    assert {each["of"].split()[0] for each in found} == {"mptk", "mptk-zipped"}

    text = tmp_path / "text.txt"
    text.write_text(testing.SENTENCES * 40)
    out = tmp_path / "out"
    words = ("prune", tmp_path / "model.zip", "--label", "first", "--data", text, *PRUNE.split(), "--out", out)
    run(python, *words, cache=tmp_path / "cache")
    assert run(python, "labels", out, cache=tmp_path) == f"{out}: first\n"
    # Without the feature the folder is read as before, and its row is kept.
    assert Report.read(out).rows == {"label": {"text": "first"}}


def test_it_is_short() -> None:
    assert sum(len(file.read_text().splitlines()) for file in EXAMPLE.rglob("*.py")) <= 80
