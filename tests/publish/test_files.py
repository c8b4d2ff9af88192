"""JSON that every reader takes, and the manifest of a published folder."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import time
from pathlib import Path

import pytest
from forks import run_with_hook

from mptk.errors import ChangedError, FileError, OutputError
from mptk.files import format_json, make_staging, write_file, write_json, write_text, write_together
from mptk.files.staging import LOCK
from mptk.publish.folder import publish
from mptk.publish.manifest import check_manifest, copy_listed, hash_file, read_manifest, update_manifest, write_manifest
from mptk.testing import expect_error

ROOT = Path(__file__).resolve().parents[2]


def find_files(pattern: str) -> list[str]:
    """The product's files that have a match."""
    files = [file for package in ("mptk", "passes") for file in (ROOT / package).rglob("*.py")]
    return sorted(str(file.relative_to(ROOT)) for file in files if re.search(pattern, file.read_text()))


def test_json_has_null_for_what_is_no_number():
    content = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": math.nan}, "d": "NaN", "e": True}
    found = json.loads(format_json(content), parse_constant=lambda name: pytest.fail(name))
    assert found == {"a": [1.5, None, [None, None]], "b": {"c": None}, "d": "NaN", "e": True}


@pytest.mark.features
def test_all_json_is_written_by_the_one_helper():
    expected = ["features/gguf/llama_cpp", "files/places", "files/replace", "reading", "targets/beside"]
    # llama_cpp runs without mptk; but for replace and places the others look at values.
    assert find_files(r"json\.dumps?\(") == [f"mptk/{name}.py" for name in expected]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "weights"

    def half(file):
        file.write_text("ha")
        assert not path.exists() or path.read_text() == "whole"
        raise RuntimeError("stopped")

    for before in ([], ["weights"]):
        with pytest.raises(RuntimeError, match="stopped"):
            write_file(path, half)
        assert [p.name for p in tmp_path.iterdir()] == before
        write_file(path, lambda file: file.write_text("whole"))
        assert path.read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_a_folder_that_cannot_be_locked_goes_at_once(tmp_path):
    def fill(event, given):
        if event == "open" and given[0] == LOCK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work():
        with pytest.raises(OSError, match="No space left"):
            write_file(tmp_path / "weights", Path.touch)

    assert run_with_hook(fill, work) == 0
    assert list(tmp_path.iterdir()) == []


def test_text_is_utf8_in_a_folder_that_is_made_and_a_refusal_is_one_line(tmp_path):
    write_text(tmp_path / "new" / "text", "σ\n")
    assert (tmp_path / "new" / "text").read_bytes() == "σ\n".encode()
    with expect_error(OutputError, name=tmp_path / "new" / "text" / "more"):
        write_text(tmp_path / "new" / "text" / "more", "x")


def test_files_that_belong_together_appear_in_order_or_not_at_all(tmp_path):
    (tmp_path / "other").touch()

    def write(*, fails):
        with write_together(tmp_path, "data", "index") as temporary:
            (temporary / "data").write_text("1")
            (temporary / "index").write_text("2")
            assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["other"]
            if fails:
                raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write(fails=True)
    assert [p.name for p in tmp_path.iterdir()] == ["other"]
    write(fails=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "index", "other"]


def test_files_are_renamed_into_their_place_by_the_one_helper():
    """Two others ask where temporary files go, two remove a folder in their own output, two open a file without a
    name, one describes a plugin of a test.
    """
    others = [
        "mptk/cli/failure",
        "mptk/cli/options",
        "mptk/run/estimate",
        "mptk/targets/onnx",
        "mptk/testing/laboratory",
    ]
    others += ["mptk/testing/plugins", "passes/targets/onnx/tensors"]
    found = find_files(r"os\.replace\(|\.rename\(|temporary\.replace\(|tempfile|mkdtemp|rmtree")
    assert [name for name in found if not name.startswith("mptk/files/")] == [f"{name}.py" for name in others]


@pytest.fixture
def folder(tmp_path):
    with publish(tmp_path / "out") as folder:
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.onnx").write_bytes(b"graph")
        (folder / "report.json").write_text("{}")
    return tmp_path / "out"


def test_the_manifest_lists_every_file_with_its_digest_and_every_difference_is_named(folder):
    files = {"onnx/model.onnx": b"graph", "report.json": b"{}"}
    assert read_manifest(folder) == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    check_manifest(folder)
    (folder / "onnx" / "model.onnx").write_bytes(b"grape")
    with expect_error(ChangedError, name="onnx/model.onnx"):
        check_manifest(folder)
    (folder / "onnx" / "more").symlink_to("/nowhere")
    with expect_error(ChangedError, name="onnx/more"):
        check_manifest(folder)
    (folder / "report.json").unlink()
    with expect_error(ChangedError, name="report.json"):
        check_manifest(folder)


def test_a_file_that_comes_later_is_taken_in_and_hides_nothing(folder):
    for number in (1, 2):
        write_json(folder / "bench.json", {"rows": number})
        update_manifest(folder, "bench.json")
        check_manifest(folder)
    (folder / "report.json").write_text("{ }")
    update_manifest(folder, "bench.json")
    with expect_error(ChangedError, name="report.json"):
        check_manifest(folder)


def test_a_marker_of_an_earlier_version_lists_nothing(folder):
    (folder / "mptk.json").write_text('{"format": "mptk-output/1"}')
    with expect_error(FileError, name=folder):
        check_manifest(folder)
    with expect_error(OutputError, name=folder), publish(folder):
        pass


def test_a_file_is_digested_again_after_every_change(tmp_path):
    """Also after one that leaves its size and its own time, and after one at once, which a coarse clock may not show."""
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    time.sleep(0.15)  # after which a digest is remembered
    for _ in range(2):
        assert hash_file(file) == hashlib.sha256(b"one").hexdigest()
    state = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert hash_file(file) == hashlib.sha256(b"two").hexdigest()
    file.write_bytes(b"six")
    assert hash_file(file) == hashlib.sha256(b"six").hexdigest()


def test_a_signal_while_a_folder_goes_waits_until_it_is_gone(tmp_path):
    stopped = []

    def stop(event, given):
        if event == "os.rmdir" and not stopped:
            stopped.append(event)
            raise KeyboardInterrupt

    def work():
        folder = make_staging(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            folder.close()

    assert run_with_hook(stop, work) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_copy_has_the_listed_files_with_their_folders(tmp_path):
    folder, new = tmp_path / "folder", tmp_path / "new"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "c.txt").write_text("c")
    write_manifest(folder)
    (folder / "later.txt").write_text("not listed")
    copy_listed(folder, new)
    assert [str(path.relative_to(new)) for path in new.rglob("*") if path.is_file()] == ["a/b/c.txt"]
