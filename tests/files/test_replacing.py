"""Files and folders get their names whole, belong to one process at a time, and nothing of a killed one stays."""

from __future__ import annotations

import errno
import os
import signal
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import hold, keep_fork, kill_fork_after, list_names, run_with_hook, start_fork, wait_for_code, write
from safetensors.torch import save_file

from mptk.errors import FileError, MachineError, MptkError, OutputError
from mptk.files import claim_place, discard, make_scratch, make_staging, staging, tidy, write_file, write_text
from mptk.files.outputs import check_apart
from mptk.files.replace import put_folder
from mptk.io import build_private, hash_model, locate_private_folder, tidy_shared
from mptk.io.cache import build_once
from mptk.publish.folder import amend, publish
from mptk.publish.manifest import check_manifest, read_manifest, update_manifest, write_manifest
from mptk.testing import expect_error


def others(folder: Path) -> dict[str, str]:
    """What a user puts into an output: notes, a fine-tuned model, a link, a file in a folder of mptk's, a program."""
    (folder / "NOTES.txt").write_text("mine")
    (folder / "checkpoint-finetuned").mkdir()
    (folder / "checkpoint-finetuned" / "file").write_text("trained for a week")
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("NOTES.txt")
    (folder / "onnx" / "mine.onnx").write_text("graph")
    (folder / "run.sh").write_text("#!/bin/sh")
    (folder / "run.sh").chmod(0o700)
    return {n: (folder / n).read_text() for n in ("NOTES.txt", "checkpoint-finetuned/file", "onnx/mine.onnx", "link")}


# ---- one at a time ----


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    out = tmp_path / "deep" / "out"
    with keep_fork(lambda: hold(out)), expect_error(OutputError, name=out), publish(out):
        pass
    write(out, "mine")  # the lock of a process that is dead is free
    assert (list_names(tmp_path / "deep"), list_names(out)) == (["out"], ["file", "mptk.json"])


def test_a_thread_may_claim_again_what_it_has_and_an_empty_parent_goes(tmp_path):
    with claim_place(tmp_path / "new" / "out") as one, claim_place(tmp_path / "new" / "out") as two:
        assert one is two
    assert list_names(tmp_path) == []


def test_eight_processes_fill_one_cache_and_write_one_output(tmp_path):
    def work() -> None:
        def build(path: Path) -> None:
            with (tmp_path / "built").open("a") as file:
                file.write("x")
            path.mkdir()
            for name in "abc":
                (path / name).write_text(name)

        assert list_names(build_once(tmp_path / "cache" / "kind" / "made", build)) == ["a", "b", "c"]
        for turn in range(5):
            with suppress(MptkError):
                write(tmp_path / "out", f"{os.getpid()} {turn}" * 99)
            write_text(tmp_path / "text", "whole" * 999)

    write(tmp_path / "out", "first")
    pids = [start_fork(work) for _ in range(8)]
    assert [wait_for_code(pid) for pid in pids] == [0] * 8
    assert (tmp_path / "built").read_text() == "x"
    assert (tmp_path / "text").read_text() == "whole" * 999
    check_manifest(tmp_path / "out")
    assert list_names(tmp_path) == ["built", "cache", "out", "text"]
    assert list_names(tmp_path / "cache" / "kind") == ["made"]


# ---- after a kill ----


def test_what_killed_processes_left_is_removed_and_what_the_living_use_stays(tmp_path, set_cache):
    set_cache(tmp_path / "cache")
    places = [tmp_path / place for place in ("cache", "cache/onnx", "cache/gguf/some", "tmp", "runs")]
    for place in places:
        place.mkdir(parents=True)
        (place / "other").mkdir()

    def begin() -> object:
        made = [make_scratch(), *(make_staging(place) for place in places), hold(tmp_path / "runs" / "out")]
        for each in made[:-1]:
            (each.folder / "half").write_text("x")
        return made

    def work() -> None:
        tempfile.tempdir = str(tmp_path / "tmp")
        kill_fork_after(begin)
        left = sorted(path.name for path in tmp_path.rglob(".*mptk*"))
        assert len(left) == 7
        with keep_fork(lambda: make_staging(tmp_path / "tmp")) as _:
            tidy_shared()
            tidy(tmp_path / "runs")
            assert [len(list_names(place)) for place in places[-2:]] == [2, 1]
        tidy_shared()

    assert wait_for_code(start_fork(work)) == 0
    assert [path.name for path in tmp_path.rglob(".*mptk*")] == []
    assert all((place / "other").is_dir() for place in places)


def test_a_process_killed_before_it_had_its_lock_leaves_nothing_either(tmp_path):
    (tmp_path / ".mptk-0123").mkdir()
    (tmp_path / ".mine.mptk").mkdir()
    (tmp_path / ".mine.mptk" / "thesis.txt").write_text("irreplaceable")
    tidy(tmp_path)
    assert list_names(tmp_path) == [".mine.mptk"]  # it has no lock of ours


def without_exchange(event: str, given: tuple[Any, ...]) -> None:
    """A C library that cannot exchange two names at once (for ``hooked``)."""
    if event == "ctypes.dlsym" and given[1] == "renameat2":
        raise AttributeError(given[1])


@pytest.mark.parametrize("renamed", [False, True])
def test_killed_between_two_renames_the_earlier_output_comes_back(tmp_path, renamed):
    """Where the system cannot exchange two names at once: before the new folder gets its name, and after."""
    out, last = tmp_path / "out", False
    write(out, "earlier")

    def die(event: str, given: tuple[Any, ...]) -> None:
        nonlocal last
        without_exchange(event, given)
        if event == "os.kill":  # its own
            return
        placed, last = last, event == "os.rename" and given[1] == "out"
        if placed if renamed else last:
            os.kill(os.getpid(), signal.SIGKILL)

    def replaced() -> None:
        with claim_place(out) as staging:
            (staging.folder / "file").write_text("new")
            put_folder(staging, out)

    assert run_with_hook(die, replaced) == -signal.SIGKILL
    assert out.exists() == renamed
    tidy(tmp_path)
    assert list_names(tmp_path) == ["out"]
    assert (out / "file").read_text() == ("new" if renamed else "earlier")


def test_without_locks_of_the_system_a_dead_owners_folder_is_free_and_a_living_ones_is_not(tmp_path):
    def refuse(event: str, given: tuple[Any, ...]) -> None:
        if event == "fcntl.flock":
            raise OSError(errno.ENOSYS, "Function not implemented")

    def work() -> None:
        with keep_fork(lambda: hold(tmp_path / "out")), expect_error(OutputError, name=tmp_path / "out"):
            hold(tmp_path / "out")
        write(tmp_path / "out", "mine")
        assert list_names(tmp_path) == ["out"]
        elsewhere = make_staging(tmp_path)
        (elsewhere.path / staging.LOCK).write_text('{"pid": 1, "host": "elsewhere", "command": "mptk"}')
        tidy(tmp_path)
        assert elsewhere.path.is_dir()
        elsewhere.close()

    assert run_with_hook(refuse, work) == 0


def test_a_fork_removes_nothing_of_its_parent(tmp_path):
    mine = make_staging(tmp_path)
    assert wait_for_code(start_fork(mine.close)) == 0
    assert mine.folder.is_dir()
    mine.close()
    assert list_names(tmp_path) == []


# ---- what a folder gets, and what it keeps ----


def test_amending_replaces_the_folder_at_once_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    with publish(out) as new:
        (new / "onnx").mkdir()
        (new / "onnx" / "graph").write_text("graph")
        (new / "report").write_text("old")
    inode = (out / "onnx" / "graph").stat().st_ino

    def change(*, fails: bool) -> None:
        with amend(out) as new:
            write_text(new / "report", "new")
            update_manifest(new, "report")
            assert (out / "report").read_text() == "old"
            check_manifest(out)
            if fails:
                raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        change(fails=True)
    assert (out / "report").read_text() == "old"
    change(fails=False)
    check_manifest(out)
    assert (out / "report").read_text() == "new"
    assert (out / "onnx" / "graph").stat().st_ino == inode
    assert list_names(tmp_path) == ["out"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_rights_are_those_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        with publish(tmp_path / "out") as new:
            (new / "onnx").mkdir(mode=0o700)
            save_file({"x": torch.ones(2)}, new / "onnx" / "weights")  # safetensors makes it private
            write_text(new / "text", "x")
        write_file(tmp_path / "file", lambda file: save_file({"x": torch.ones(2)}, file))
        build_once(tmp_path / "made", lambda path: save_file({"x": torch.ones(2)}, path))
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_a_folder_goes_from_one_moment_to_the_next(tmp_path):
    (tmp_path / "run" / "a").mkdir(parents=True)
    seen: list[bool] = []

    def look(event: str, given: tuple[Any, ...]) -> None:
        if event == "os.rmdir":
            seen.append((tmp_path / "run").exists())

    def remove() -> None:
        discard(tmp_path / "run")
        assert seen
        assert not any(seen)

    assert run_with_hook(look, remove) == 0
    assert list_names(tmp_path) == []


# ---- links and sources ----


def test_no_planted_link_is_followed(tmp_path):
    """Nor is a folder of somebody else's taken for ours."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("theirs")
    place = tmp_path / "place"
    place.mkdir()
    for name in ("report.json", "report.json.tmp", f"report.json.{os.getpid()}.tmp"):
        (place / name).symlink_to(tmp_path / "victim" / "file")
    with expect_error(OutputError, name=place / "report.json"):
        write_text(place / "report.json", "mine")
    write_file(place / "report.json", lambda file: file.write_text("mine"))
    assert (place / "report.json").read_text() == "mine"
    assert not (place / "report.json").is_symlink()
    (place / "out").symlink_to(tmp_path / "victim")
    with expect_error(OutputError, name=place / "out"):
        write(place / "out", "mine")
    (place / ".new.mptk").symlink_to(tmp_path / "victim")
    tidy(place)
    with expect_error(OutputError, name=place / "new"):
        write(place / "new", "mine")
    assert (tmp_path / "victim" / "file").read_text() == "theirs"
    assert list_names(tmp_path / "victim") == ["file"]


def test_a_pipe_is_written_as_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = start_fork(lambda: write_text(tmp_path / "pipe", "x"))
    assert (tmp_path / "pipe").read_text() == "x"
    assert wait_for_code(writer) == 0
    assert list_names(tmp_path) == ["pipe"]


def test_what_is_read_is_never_replaced(tmp_path, go_to):
    go_to(tmp_path)
    write(tmp_path / "out", "model")
    for source in ("out", "out/file", str(tmp_path / "out")):
        with expect_error(OutputError, name="out"):
            check_apart(Path("out"), source)
    check_apart(Path("new"), "out", "some/hub-model")
    for inside in ("out/inside", "out/new/inside", "new/../out/inside"):
        with expect_error(OutputError, name=inside):
            check_apart(Path(inside), "out")


# ---- the system says no ----


@pytest.mark.parametrize("call", ["os.mkdir", "os.rename", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_what_the_system_refuses_leaves_the_earlier_output(tmp_path, number, call):
    write(tmp_path / "out", "earlier")

    def refuse(event: str, given: tuple[Any, ...]) -> None:
        without_exchange(event, given)
        if event == call and not (call == "open" and not given[2] & os.O_CREAT):  # it only reads
            raise OSError(number, os.strerror(number))

    def work() -> None:
        with expect_error(OutputError, name=tmp_path / "out"):
            write(tmp_path / "out", "new")

    assert run_with_hook(refuse, work) == 0
    assert (tmp_path / "out" / "file").read_text() == "earlier"
    tidy(tmp_path)
    assert list_names(tmp_path) == ["out"]


def test_an_error_about_another_file_names_that(tmp_path):
    def read(path: Path) -> None:
        with publish(tmp_path / "out"):
            path.read_text()

    with expect_error(FileError, name=tmp_path / "source"):
        read(tmp_path / "source")
    assert list_names(tmp_path) == []


# ---- what is the user's own ----


@pytest.fixture
def output(tmp_path):
    with publish(tmp_path / "out") as new:
        (new / "onnx").mkdir()
        (new / "onnx" / "model.onnx").write_text("1")
        (new / "README.md").write_text("1")
    return tmp_path / "out"


def again(folder: Path, *, overwrite: bool = False) -> None:
    with publish(folder, overwrite=overwrite) as new:
        (new / "onnx").mkdir()
        (new / "onnx" / "model.onnx").write_text("2")


@pytest.mark.parametrize("change", [others, lambda folder: (folder / "README.md").write_text("my own words")])
def test_an_output_with_work_of_the_user_is_refused(output, change):
    """Also if it is a file of mptk's that they changed."""
    change(output)
    before = {path: path.is_file() and path.read_text() for path in output.rglob("*")}
    with expect_error(OutputError, name=output):
        again(output)
    assert {path: path.is_file() and path.read_text() for path in output.rglob("*")} == before


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_leaves_files_of_the_user_where_they_are(output, exchange):
    mine = others(output)
    (output / "README.md").write_text("changed")
    for _ in range(2):
        if exchange:
            again(output, overwrite=True)
        else:
            assert run_with_hook(without_exchange, lambda: again(output, overwrite=True)) == 0
        assert {name: (output / name).read_text() for name in mine} == mine
        assert (output / "onnx" / "model.onnx").read_text() == "2"
        assert (output / "empty").is_dir()
        assert (output / "link").is_symlink()
        assert stat.S_IMODE((output / "run.sh").stat().st_mode) == 0o700
        assert not (output / "README.md").exists()
    assert set(read_manifest(output)) == {"onnx/model.onnx"}
    assert list_names(output.parent) == ["out"]


def test_a_file_that_comes_during_a_run_stays(output):
    with publish(output) as new:
        (new / "README.md").write_text("2")
        (output / "NOTES.txt").write_text("mine")
    assert (output / "NOTES.txt").read_text() == "mine"
    assert (output / "README.md").read_text() == "2"


def test_a_file_of_the_user_is_not_overwritten_by_one_of_that_name(output):
    (output / "plan.json").write_text("mine")
    with expect_error(OutputError, name=output / "plan.json"), publish(output, overwrite=True) as new:
        (new / "plan.json").write_text("2")
    assert (output / "plan.json").read_text() == "mine"
    assert list_names(output.parent) == ["out"]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    "marker", ['{"format": "mptk-output/1"}', '{"format": "mptk-output/1", "files": []}', "{}", None]
)
def test_a_marker_that_lists_nothing_makes_no_output(tmp_path, marker, overwrite):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("irreplaceable")
    if marker is not None:
        (folder / "mptk.json").write_text(marker)
    with expect_error(OutputError, name=folder):
        again(folder, overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == "irreplaceable"


# ---- the cache of exports ----


def test_content_and_not_times_names_an_export(tmp_path):
    times, seen = time.time_ns(), list[str]()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for value in (1.0, 2.0, 1.0):
        save_file({"x": torch.full((2,), value)}, tmp_path / "model.safetensors")
        os.utime(tmp_path / "model.safetensors", ns=(times, times))
        seen.append(hash_model(str(tmp_path)))
    assert seen[0] == seen[2] != seen[1]
    (tmp_path / "config.json").write_text('{"model_type": "gemma"}')
    assert hash_model(str(tmp_path)) not in seen


@pytest.fixture
def exported(tmp_path, set_cache):
    """Gives the cached export of a model, whose graph is in truth the word ``graph``."""
    set_cache(tmp_path / "cache")

    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"graph")

    return lambda: build_private(locate_private_folder("onnx", "stamp"), build)


def rewritten(folder: Path) -> None:
    """By somebody who knows of the manifest, and may write into the folder."""
    (folder / "model.onnx").write_bytes(b"grape")
    write_manifest(folder)
    folder.chmod(0o777)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.onnx").write_bytes(b"gra"),
        lambda folder: (folder / "model.onnx").unlink(),
        lambda folder: (folder / "model.onnx_data").write_bytes(b"added"),
        lambda folder: (folder / "mptk.json").unlink(),
        rewritten,
    ],
    ids=["cut short", "lost", "added", "no manifest", "open to others"],
)
def test_a_damaged_or_foreign_export_is_made_anew(exported, damage):
    folder = exported()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    damage(folder)
    assert exported() == folder
    assert (folder / "model.onnx").read_bytes() == b"graph"
    assert sorted(file.name for file in folder.iterdir()) == ["model.onnx", "mptk.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_an_export_of_another_user_is_refused(exported):
    mine = exported()
    assert mine.name.endswith(f"-{os.geteuid()}")
    os.chown(mine, 4321, -1)
    with expect_error(MachineError, name=mine):
        exported()
