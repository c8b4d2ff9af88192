"""What other users can and cannot do to a run's files, and which folders mptk takes for its own.

It reaches for mptk.files.staging: hidden folders.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import hold, kill_fork_after, list_names, run_with_hook, start_fork, wait_for_code, write
from inside import Stopped
from lab import bare_run
from toy_checkpoints import write_gguf
from typer.testing import CliRunner

import mptk
from mptk.cli.app import tidy_for
from mptk.cli.main import app
from mptk.config import Learning, Settings, to_json
from mptk.errors import ChangedError, FileError, MachineError, MptkError, OutputError, explain_errors
from mptk.features.ladder.ladder import is_finished
from mptk.files import claim_place, discard, make_scratch, make_staging, staging, tidy, write_file, write_text
from mptk.io.cache import build_once
from mptk.ir import PassRecord
from mptk.protocols import RunFolder, check_unfinished_run, read_kept_settings
from mptk.protocols.unfinished import RUN_MARK
from mptk.publish.folder import amend, publish
from mptk.staged.spool import Spool
from mptk.testing import expect_error, make_llama, make_tokenizer

ANOTHER = 1000
"""The number of a user who is not this one."""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def victim(tmp_path):
    """A private folder of this user."""
    folder = tmp_path / "private"
    (folder / "new").mkdir(mode=0o700, parents=True)
    folder.chmod(0o700)
    (folder / "new" / "thesis.txt").write_text("irreplaceable")
    (folder / "thesis.txt").write_text("irreplaceable")
    return folder


def require_untouched(victim: Path) -> None:
    found = {str(path.relative_to(victim)): path.is_dir() or path.read_text() for path in victim.rglob("*")}
    assert found == {"new": True, "new/thesis.txt": "irreplaceable", "thesis.txt": "irreplaceable"}


def swap(parent: Path, victim: Path) -> None:
    """What somebody may do who can write into a folder: every hidden folder becomes a link to another."""
    for name in [name for name in os.listdir(parent) if name.startswith(".") and "mptk" in name]:
        os.rename(parent / name, parent / f"away-{name.lstrip('.')}")
        (parent / name).symlink_to(victim)


# ---- links that are planted while a run works ----


def published(place: Path, act: Callable[[], None]) -> None:
    with publish(place / "out") as new:
        (new / "file").write_text("x")
        act()


def renewed(place: Path, act: Callable[[], None]) -> None:
    with claim_place(place / "out") as held:
        act()
        held.renew()


def left(place: Path, act: Callable[[], None]) -> None:
    with claim_place(place / "out"):
        act()


def amended(place: Path, act: Callable[[], None]) -> None:
    write(place / "out", "earlier")
    with amend(place / "out"):
        act()


def filed(place: Path, act: Callable[[], None]) -> None:
    write_file(place / "file", lambda path: (path.write_text("x"), act()))


def fails(place: Path, act: Callable[[], None]) -> None:
    with make_staging(place):
        act()
        raise OSError("a library that lost its files")


@pytest.mark.parametrize("use", [published, renewed, left, amended, filed, fails])
def test_a_link_that_is_planted_during_a_run_leads_nowhere(use, tmp_path, victim):
    """Nothing is removed through it, and nothing is published of what was written elsewhere."""
    place = tmp_path / "place"
    place.mkdir()
    with expect_error(OutputError) as refused:
        use(place, lambda: swap(place, victim))
    assert Path(refused.value.name).parent == place
    assert Path(refused.value.name).is_symlink()
    require_untouched(victim)
    if use is amended:
        assert (place / "out" / "file").read_text() == "earlier"
    tidy(place)
    require_untouched(victim)
    assert sum(path.is_symlink() for path in place.iterdir()) == 1, "it is left as it is"


def test_a_folder_above_that_is_exchanged_during_a_run_leads_nowhere(tmp_path, victim):
    """By its owner, or by a group's member: nothing is published of what was written elsewhere, nothing is removed."""

    def act() -> None:
        (tmp_path / "place").rename(tmp_path / "away")
        (tmp_path / "place").mkdir()
        (tmp_path / "place" / ".out.mptk").symlink_to(victim)

    (tmp_path / "place").mkdir()
    with expect_error(OutputError, name=tmp_path / "place" / ".out.mptk"):
        published(tmp_path / "place", act)
    require_untouched(victim)
    assert list_names(tmp_path / "away") == []


def test_a_new_hidden_folder_that_is_exchanged_at_once_is_not_taken(tmp_path, victim):
    exchanged: list[str] = []

    def exchange(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and not exchanged and str(given[0]).startswith(".mptk-"):
            exchanged.append(given[0])
            os.rename(tmp_path / given[0], tmp_path / "away")
            os.rename(victim, tmp_path / given[0])

    def make() -> None:
        with pytest.raises(OSError, match="not permitted"):
            make_staging(tmp_path)

    assert run_with_hook(exchange, make) == 0
    require_untouched(next(path for path in tmp_path.iterdir() if path.name.startswith(".mptk-")))


def test_a_folder_that_is_exchanged_while_it_is_discarded_stays(tmp_path, victim):
    def exchange(event: str, given: tuple[Any, ...]) -> None:
        if event == "os.rename" and given[0] == "run":
            os.rename(tmp_path / "run", tmp_path / "away")
            os.rename(victim, tmp_path / "run")

    def remove() -> None:
        with expect_error(OutputError):
            discard(tmp_path / "run")

    (tmp_path / "run").mkdir()
    assert run_with_hook(exchange, remove) == 0
    require_untouched(tmp_path / "run")


TAKEN = (0o775, 0), (0o1777, 0), (0o755, 4321)


@as_root
@pytest.mark.parametrize(("mode", "group"), [(0o777, 0), (0o772, 0), (0o775, 4321), *TAKEN])
def test_a_folder_that_others_can_write_in_is_refused_before_any_work(tmp_path, mode, group):
    """Not one whose sticky bit keeps others from renaming, nor one of the own group."""
    place = tmp_path / "place"
    place.mkdir()
    os.chown(place, -1, group)
    place.chmod(mode)
    if (mode, group) in TAKEN:
        write(place / "out", "x")
        return
    for work in (lambda: write(place / "out", "x"), lambda: make_staging(place), lambda: hold(place / "out")):
        with expect_error(MachineError, name=place):
            work()
    assert list_names(place) == []


def test_a_folder_above_that_all_can_write_in_is_refused_too(tmp_path):
    (tmp_path / "all" / "mine").mkdir(parents=True)
    (tmp_path / "all").chmod(0o777)
    with expect_error(MachineError, name=tmp_path / "all"):
        write(tmp_path / "all" / "mine" / "out", "x")
    assert list_names(tmp_path / "all" / "mine") == []


def test_temporary_files_are_refused_where_others_can_exchange_them(laboratory, tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o777)
    model, settings, ran = str(laboratory.open_model()), laboratory.make_settings(), list[PassRecord]()

    def work() -> None:
        tempfile.tempdir = str(tmp_path / "tmp")
        with expect_error(MachineError, name=tmp_path / "tmp"):
            make_scratch()
        with expect_error(MachineError, name=tmp_path / "tmp"):
            mptk.prune(model, tmp_path / "out", settings, on_stage=ran.append)
        assert ran == []

    assert wait_for_code(start_fork(work)) == 0
    assert list_names(tmp_path) == ["tmp"]


@as_root
def test_another_user_who_exchanges_a_file_while_it_is_written_gains_nothing(tmp_path, victim):
    """One file is made elsewhere if its folder is open to others: the command's result is not lost."""
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)  # the other user must get there
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o777)

    def attack() -> None:
        os.setgroups([])
        os.setgid(ANOTHER)
        os.setuid(ANOTHER)
        swap(place, victim)

    def writes(path: Path) -> None:
        path.write_text("x")
        if attacked:
            assert wait_for_code(start_fork(attack)) == 0

    for attacked in (False, True):
        with suppress(MptkError, OSError):
            write_file(place / f"file-{attacked}", writes)
    assert (place / "file-False").read_text() == "x"
    require_untouched(victim)


# ---- which calls follow paths ----


def test_a_run_removes_and_renames_by_no_path(tmp_path):
    """Seen by the interpreter's audit events: of publishing, replacing, discarding, single files and tidying."""
    kill_fork_after(lambda: hold(tmp_path / "left"))
    seen: list[str] = []

    def audit(event: str, given: tuple[Any, ...]) -> None:
        numbers = {"os.rename": (2, 3), "os.remove": (1,), "os.rmdir": (1,), "shutil.rmtree": (1,)}.get(event, ())
        if any(given[i] in (-1, None) for i in numbers):
            seen.append(f"{event} {given}")

    def work() -> None:
        for content in "12":
            write(tmp_path / "deep" / "out", content)
        write_text(tmp_path / "text", "x")
        (tmp_path / "gone" / "more").mkdir(parents=True)
        discard(tmp_path / "gone")
        tidy(tmp_path)
        assert seen == []

    assert run_with_hook(audit, work) == 0
    assert list_names(tmp_path) == ["deep", "text"]


# ---- mptk's own, by a mark ----

FOUND = {
    "metrics.jsonl": "{}",
    "settings.json": "{}",
    "text.safetensors": "x",
    "mptk.mark": json.dumps({"token": "1", "name": "out.run", "folder": 1, "mark": "2"}),
}


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", FOUND)
def test_a_folder_of_the_user_is_never_an_unfinished_run(tmp_path, name):
    """Whatever it holds; nor is an unfinished run of a version that had no marks."""
    out, run = tmp_path / "out", tmp_path / "out.run"
    (run / "plots").mkdir(parents=True)
    (run / "plots" / "loss.png").write_text("mine")
    (run / name).write_text(FOUND[name])
    before = content(run)
    for work in (
        lambda: check_unfinished_run(out, {}, resume=False),
        lambda: check_unfinished_run(out, {}, resume=True),
        lambda: read_kept_settings(out),
        lambda: RunFolder(out, {}, resume=False),
        lambda: is_finished(bare_run(mptk.Settings(resume=True), out=out)),
    ):
        with expect_error(OutputError, name=run):
            work()
    assert content(run) == before


def test_a_folder_that_comes_during_a_run_is_not_taken_for_its_own(tmp_path):
    folder = RunFolder(tmp_path / "out", {}, resume=False)
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "thesis.txt").write_text("mine")
    with expect_error(OutputError, name=tmp_path / "out.run"):
        folder.save("text", {"ids": torch.ones(2)})
    folder.remove()
    assert content(tmp_path / "out.run") == {"thesis.txt": "mine"}


def test_a_copy_of_an_unfinished_run_is_one_only_by_the_users_word(tmp_path):
    """It was moved to another disk, or renamed to be kept: it is not replaced, but it can be resumed."""
    one_shot = to_json(Settings(learning=Learning(steps=0)))
    RunFolder(tmp_path / "out", one_shot, resume=False).save("text", {"ids": torch.ones(2)})
    shutil.copytree(tmp_path / "out.run", tmp_path / "copy.run")
    with expect_error(OutputError, name=tmp_path / "copy.run"):
        RunFolder(tmp_path / "copy", one_shot, resume=False)
    again = RunFolder(tmp_path / "copy", one_shot, resume=True)
    assert again.keeps("text")
    again.remove()
    assert list_names(tmp_path) == ["out.run"]
    RunFolder(tmp_path / "out", one_shot, resume=False)
    assert list_names(tmp_path) == []


def test_the_folder_of_a_run_is_marked_before_it_has_its_name(tmp_path):
    def stop(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and str(given[0]).endswith(RUN_MARK):
            raise Stopped

    def make() -> None:
        with pytest.raises(Stopped):
            RunFolder(tmp_path / "out", {}, resume=False).save("text", {"ids": torch.ones(2)})

    assert run_with_hook(stop, make) == 0
    assert list_names(tmp_path) == []


@pytest.mark.parametrize("lock", [None, "", "mine", '{"pid": 1, "host": "h", "command": "c"}'])
def test_a_hidden_folder_of_the_user_is_neither_emptied_nor_removed(tmp_path, lock):
    """Also if it holds a file with the name of mptk's lock, as an earlier version's did."""
    folders = [tmp_path / name for name in (".out.mptk", ".mptk-x", ".mptk-0123456789ab")]
    for folder in folders:
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
        if lock is not None:
            (folder / staging.LOCK).write_text(lock)
    before = content(tmp_path)
    tidy(tmp_path)
    with expect_error(OutputError, name=tmp_path / ".out.mptk"):
        write(tmp_path / "out", "x")
    assert content(tmp_path) == before


def test_a_mark_is_of_one_folder(tmp_path):
    """What a process left that was killed is removed, and a copy of it that the user made is not."""
    kill_fork_after(lambda: hold(tmp_path / "out"))
    shutil.copytree(tmp_path / ".out.mptk", tmp_path / ".mine.mptk")
    (tmp_path / ".mptk-0123456789ab").mkdir()
    (tmp_path / ".mptk-0123456789ab" / staging.LOCK).touch()  # killed before it had written its mark
    tidy(tmp_path)
    assert list_names(tmp_path) == [".mine.mptk"]


def test_hidden_folders_are_private(tmp_path):
    before = os.umask(0)
    try:
        with make_staging(tmp_path) as made, claim_place(tmp_path / "out") as held:
            assert [stat.S_IMODE(each.path.stat().st_mode) for each in (made, held)] == [0o700] * 2
        RunFolder(tmp_path / "out", {}, resume=False).save("text", {"ids": torch.ones(2)})
        assert stat.S_IMODE((tmp_path / "out.run").stat().st_mode) == 0o755
        write(tmp_path / "deep" / "out", "x")
    finally:
        os.umask(before)


@pytest.mark.parametrize("name", ["{}.run", ".{}.mptk"])
def test_a_command_refuses_the_users_folder_before_any_work(laboratory, tmp_path, name):
    llama, settings, ran = str(laboratory.open_model()), laboratory.make_settings(), list[PassRecord]()
    asked = {"data": settings.data, "samples": 4, "length": 32, "onnx": False, "progress": None}
    out = tmp_path / "out"
    for work, output in (
        (lambda: mptk.prune(llama, out, settings, on_stage=ran.append), out),
        (lambda: mptk.prune(llama, out, settings, resume=True), out),
        (lambda: mptk.shapes(llama, out, sparsity=0.3, search_tokens=0, **asked), out),
        (lambda: mptk.ladder(llama, out, [0.1, 0.2], **asked), out / "0.2"),
        (lambda: mptk.ladder(llama, out, [0.1, 0.2], resume=True, **asked), out / "0.1"),
        (lambda: mptk.ladder(llama, out, [0.1, 0.2], shared=True, method="wanda", **asked), out),
    ):
        theirs = output.with_name(name.format(output.name))
        theirs.mkdir(parents=True)
        for file in ("metrics.jsonl", "settings.json", "mptk.lock", "thesis.txt"):
            (theirs / file).write_text("{}")
        with expect_error(OutputError, name=theirs):
            work()
        assert ran == []
        assert content(tmp_path) == {f"{theirs.relative_to(tmp_path)}/{file}": "{}" for file in os.listdir(theirs)}
        shutil.rmtree(theirs)


# ---- the rungs of a ladder ----


def test_a_ladder_locks_all_rungs_while_it_works(laboratory, tmp_path):
    """At its begin, and after the first rung."""
    out, refused = tmp_path / "m", dict[int, bool]()
    places = (out, out / "0.1", out / "0.2")

    def try_to_hold(place: Path) -> None:
        with expect_error(OutputError, name=place):
            hold(place)

    def look(_: object) -> None:
        done = sum(place.is_dir() for place in places)
        if done not in refused:
            refused[done] = all(
                wait_for_code(start_fork(lambda place=place: try_to_hold(place))) == 0 for place in places
            )
        if done == 2:
            raise Stopped

    asked = {"method": "magnitude", "samples": 4, "length": 32, "eval_length": 32, "eval_windows": 2, "onnx": False}
    model, data = str(laboratory.open_model()), str(laboratory.open_data())
    with pytest.raises(Stopped):
        mptk.ladder(model, out, [0.1, 0.2], on_stage=look, data=data, **asked)
    assert refused == {1: True, 2: True}
    assert [path.name for path in tmp_path.rglob("*mptk") if path.is_dir()] == []


def test_what_a_killed_ladder_left_goes_with_the_next_command_that_names_it(tmp_path):
    """Whatever the command, also if it only names the ladder's folder or one of its rungs."""
    for named in ("m", "m/0.2"):
        (tmp_path / "m" / "0.2").mkdir(parents=True, exist_ok=True)
        kill_fork_after(lambda: [hold(tmp_path / "m"), hold(tmp_path / "m" / "0.2"), hold(tmp_path / "m" / "0.4")])
        tidy_for([tmp_path / named])
        left = [path.name for path in (tmp_path / "m").iterdir()]
        assert left == ["0.2"], named


def test_what_a_killed_command_left_goes_with_one_whose_recipe_is_refused(tmp_path):
    kill_fork_after(lambda: [hold(tmp_path / "m")])
    assert (tmp_path / ".m.mptk").is_dir()
    (tmp_path / "run.yaml").write_text("no options")
    (tmp_path / "tmp").mkdir()

    def hold_scratch() -> list[object]:
        tempfile.tempdir = str(tmp_path / "tmp")
        return [make_scratch()]

    def refuse() -> None:
        tempfile.tempdir = str(tmp_path / "tmp")
        answer = CliRunner().invoke(app, ["prune", "--config", str(tmp_path / "run.yaml")])
        assert isinstance(answer.exception, FileError)

    kill_fork_after(hold_scratch)
    assert list_names(tmp_path / "tmp") != []
    assert wait_for_code(start_fork(refuse)) == 0
    assert not (tmp_path / ".m.mptk").exists()
    assert list_names(tmp_path / "tmp") == []


# ---- a cleaner of temporary files ----


def test_a_temporary_folder_that_goes_during_a_run_is_one_clear_error(laboratory, tmp_path):
    def clean(record: PassRecord) -> None:
        if record.name == "write stock":
            shutil.rmtree(tmp_path / ".out.mptk")

    settings = laboratory.make_settings(method="magnitude")
    with expect_error(MachineError, name=tmp_path / ".out.mptk"):
        mptk.prune(str(laboratory.open_model()), tmp_path / "out", settings, on_stage=clean)


def test_files_that_go_from_a_temporary_folder_are_one_clear_error(tmp_path):
    """Also the first of them, while the folder is still there."""
    value = {"value": torch.ones(1 << 16)}  # here: torch can start no threads in a fork

    def work(everything: bool) -> None:
        tempfile.tempdir = str(tmp_path)
        spool = Spool(0)
        spool.put("key", value)
        (place,) = (path for path in tmp_path.iterdir() if path.is_dir())
        if everything:
            shutil.rmtree(place)
        else:
            next(file for file in place.rglob("1") if file.is_file()).unlink()
        with expect_error(MachineError) as refused, explain_errors():
            spool.take("key")
        assert Path(refused.value.name).is_relative_to(place)

    for everything in (True, False):
        assert wait_for_code(start_fork(lambda everything=everything: work(everything))) == 0
        for left in tmp_path.iterdir():
            shutil.rmtree(left)


@pytest.mark.features
def test_an_entry_of_the_cache_that_goes_during_a_run_is_one_clear_error(laboratory, tmp_path, set_cache):
    set_cache(tmp_path / "cache")
    write_gguf(make_llama(layers=1), make_tokenizer(), tmp_path / "toy.gguf")

    def clean(record: PassRecord) -> None:
        if record.name == "calibration data":
            shutil.rmtree(tmp_path / "cache")

    with expect_error(ChangedError) as refused:
        mptk.prune(
            str(tmp_path / "toy.gguf"), tmp_path / "out", laboratory.make_settings(method="magnitude"), on_stage=clean
        )
    assert Path(refused.value.name).is_relative_to(tmp_path / "cache")

    def build(path: Path) -> None:
        shutil.rmtree(tmp_path / "cache")
        path.write_text("x")

    with expect_error(MachineError) as lost:
        build_once(tmp_path / "cache" / "kind" / "made", build)
    assert Path(lost.value.name).is_relative_to(tmp_path / "cache")
