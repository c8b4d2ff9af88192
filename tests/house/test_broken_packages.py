"""Installed packages that do not import: those that mptk does not need end no run, others are named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mptk.errors import PackageError, explain_errors
from mptk.testing import expect_error

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = "libnone.so.7: cannot open shared object file: No such file or directory"


def broken(place: Path, name: str, raised: str = f"OSError({LIBRARY!r})") -> None:
    """An installed package whose import fails."""
    (place / name).mkdir(parents=True)
    (place / name / "__init__.py").write_text(f"raise {raised}\n")
    (place / f"{name}-9.0.dist-info").mkdir()
    (place / f"{name}-9.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")


def ran(program: str, place: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(place), str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


MPTK_FIRST = """
import mptk
import torch; from mptk import testing
small = mptk.prune(testing.make_llama(layers=1), tokenizer=testing.make_tokenizer(begin=True), data=torch.arange(3, 51).view(2, 24),
                   method="magnitude", tolerance=1.0, samples=2, length=24, progress=None)
print(testing.make_tokenizer()("a b", return_tensors="pt")["input_ids"].shape, small.model.generate(torch.tensor([[5]]), max_new_tokens=2).shape)
"""
TRANSFORMERS_FIRST = """
import transformers
import mptk
import torch; from mptk import testing
print(testing.make_llama(layers=1).generate(torch.tensor([[5]]), max_new_tokens=2).shape)
"""


@pytest.mark.parametrize("program", [MPTK_FIRST, TRANSFORMERS_FIRST], ids=["mptk first", "transformers first"])
def test_a_broken_package_that_mptk_does_not_need_ends_no_run(program, tmp_path):
    for name in ("torchaudio", "soundfile", "torchao"):
        broken(tmp_path, name)
    broken(tmp_path, "mlx", f"ImportError({LIBRARY!r}, name='mlx')")
    run = ran(program, tmp_path)
    assert run.returncode == 0, run.stderr
    for name in ("torchaudio", "soundfile", "torchao", "mlx"):
        assert f"{name} is installed, but does not import ({LIBRARY}); mptk goes on without it" in run.stderr


def test_another_broken_package_is_named_in_one_line(tmp_path):
    broken(tmp_path, "sklearnish")
    program = "import sys; sys.argv = ['mptk', 'passes']\nimport mptk.cli.models\n"
    program += "def load():\n    import sklearnish\nfrom mptk.cli import main\nimport mptk.cli.app as app\n"
    program += "app.app = lambda **options: load()\napp.main()"
    run = ran(program, tmp_path)
    assert run.returncode == 1
    said = f"the package sklearnish is installed, but does not import ({LIBRARY}); repair it, or uninstall it"
    assert said in " ".join(run.stderr.split())
    assert "bug" not in run.stderr


def test_a_library_of_an_extension_that_is_missing_is_named_by_its_package():
    with expect_error(PackageError, name="mlx"), explain_errors():
        raise ImportError("libmlx.so: cannot open", name="mlx.core")
