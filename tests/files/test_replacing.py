"""Files and folders get their names whole, belong to one process at a time, and nothing of a killed one stays."""

from __future__ import annotations

import errno
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from inside import Inside, changed
from safetensors.torch import save_file

from mptk import MptkError
from mptk.api import graphs as api
from mptk.files import claim_place, discard, make_scratch, make_staging, staging, tidy, write_file, write_text
from mptk.files.outputs import check_apart
from mptk.files.replace import put_folder
from mptk.io.cache import build_once, tidy_shared
from mptk.protocols.run_folder import check_unfinished
from mptk.publish.folder import amend, publish
from mptk.publish.manifest import check_manifest, read_manifest, update_manifest, write_manifest


def forked(run: Callable[[], object]) -> int:
    """A fork of this process that does something with files, and ends."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    return pid


def code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(run: Callable[[], object]) -> None:
    """What a process leaves that is killed after ``run``."""

    def whole() -> None:
        kept = run()
        os.kill(os.getpid(), signal.SIGKILL)
        del kept

    assert code_of(forked(whole)) == -signal.SIGKILL


@contextmanager
def another(run: Callable[[], object]) -> Iterator[int]:
    """Another process that has done ``run`` and lives; its number."""
    reads, writes = os.pipe()

    def living() -> None:
        kept = run()
        os.write(writes, b".")
        signal.pause()
        del kept

    pid = forked(living)
    os.read(reads, 1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reads)
        os.close(writes)


def hold(folder: Path) -> object:
    held = claim_place(folder)
    held.__enter__()
    return held


def write(folder: Path, content: str) -> None:
    with publish(folder) as new:
        (new / "file").write_text(content)


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


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- one at a time ----


def test_a_second_process_is_refused_in_one_line_that_names_the_first(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with another(lambda: hold(out)) as pid, pytest.raises(MptkError) as raised, publish(out):
        pass
    said = str(raised.value)
    assert said.startswith(f"{out} is in use by process {pid} on ")
    assert said.endswith("; wait until it is done, or give another place")
    assert "\n" not in said
    write(out, "mine")  # the lock of a process that is dead is free
    assert (names(tmp_path / "deep"), names(out)) == (["out"], ["file", "mptk.json"])


def test_a_thread_may_claim_again_what_it_has_and_an_empty_parent_goes(tmp_path: Path) -> None:
    with claim_place(tmp_path / "new" / "out") as one, claim_place(tmp_path / "new" / "out") as two:
        assert one is two
    assert names(tmp_path) == []


def test_eight_processes_fill_one_cache_and_write_one_output(tmp_path: Path) -> None:
    def work() -> None:
        def build(path: Path) -> None:
            with (tmp_path / "built").open("a") as file:
                file.write("x")
            path.mkdir()
            for name in "abc":
                (path / name).write_text(name)

        assert names(build_once(tmp_path / "cache" / "kind" / "made", build)) == ["a", "b", "c"]
        for turn in range(5):
            with suppress(MptkError):
                write(tmp_path / "out", f"{os.getpid()} {turn}" * 99)
            write_text(tmp_path / "text", "whole" * 999)

    write(tmp_path / "out", "first")
    pids = [forked(work) for _ in range(8)]
    assert [code_of(pid) for pid in pids] == [0] * 8
    assert (tmp_path / "built").read_text() == "x"
    assert (tmp_path / "text").read_text() == "whole" * 999
    check_manifest(tmp_path / "out")
    assert names(tmp_path) == ["built", "cache", "out", "text"]
    assert names(tmp_path / "cache" / "kind") == ["made"]


# ---- after a kill ----


def test_what_killed_processes_left_is_removed_and_what_the_living_use_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: Inside
) -> None:
    for variable, place in (("MPTK_CACHE", "cache"), ("TMPDIR", "tmp")):
        monkeypatch.setenv(variable, str(tmp_path / place))
    inside.bound("tempfile.tempdir", None)
    places = [tmp_path / place for place in ("cache", "cache/onnx", "cache/gguf/some", "tmp", "runs")]
    for place in places:
        place.mkdir(parents=True)
        (place / "other").mkdir()

    def begin() -> object:
        made = [make_scratch(), *(make_staging(place) for place in places), hold(tmp_path / "runs" / "out")]
        for each in made[:-1]:
            (each.folder / "half").write_text("x")
        return made

    killed(begin)
    left = sorted(path.name for path in tmp_path.rglob(".*mptk*"))
    assert len(left) == 7
    with another(lambda: make_staging(tmp_path / "tmp")) as _:
        tidy_shared()
        tidy(tmp_path / "runs")
        assert [len(names(place)) for place in places[-2:]] == [2, 1]
    tidy_shared()
    assert [path.name for path in tmp_path.rglob(".*mptk*")] == []
    assert all((place / "other").is_dir() for place in places)


def test_a_process_killed_before_it_had_its_lock_leaves_nothing_either(tmp_path: Path) -> None:
    (tmp_path / ".mptk-0123").mkdir()
    (tmp_path / ".mine.mptk").mkdir()
    (tmp_path / ".mine.mptk" / "thesis.txt").write_text("irreplaceable")
    tidy(tmp_path)
    assert names(tmp_path) == [".mine.mptk"]  # it has no lock of ours


@pytest.mark.parametrize("calls", [1, 2])
def test_killed_between_two_renames_the_earlier_output_comes_back(tmp_path: Path, calls: int) -> None:
    """Where the system cannot exchange two names at once."""
    out, count = tmp_path / "out", 0
    write(out, "earlier")

    def dying(rename: Callable[..., None], *given: str, **at: int) -> None:
        nonlocal count
        rename(*given, **at)
        count += 1
        if count == calls:
            os.kill(os.getpid(), signal.SIGKILL)

    def replaced() -> None:
        with claim_place(out) as staging, changed() as inside:
            (staging.folder / "file").write_text("new")
            inside.gives("mptk.files.replace._swap_names", False)
            inside.around("os.rename", dying)
            put_folder(staging, out)

    killed(replaced)
    assert out.exists() == (calls == 2)
    tidy(tmp_path)
    assert names(tmp_path) == ["out"]
    assert (out / "file").read_text() == ("earlier" if calls == 1 else "new")


def test_without_locks_of_the_system_a_dead_owners_folder_is_free_and_a_living_ones_is_not(
    tmp_path: Path, inside: Inside
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    inside.around("fcntl.flock", unsupported)
    with another(lambda: hold(tmp_path / "out")), pytest.raises(MptkError, match="in use by process"):
        hold(tmp_path / "out")
    write(tmp_path / "out", "mine")
    assert names(tmp_path) == ["out"]
    elsewhere = make_staging(tmp_path)
    (elsewhere.path / staging.LOCK).write_text('{"pid": 1, "host": "elsewhere", "command": "mptk"}')
    tidy(tmp_path)
    assert elsewhere.path.is_dir()
    elsewhere.close()


def test_a_fork_removes_nothing_of_its_parent(tmp_path: Path) -> None:
    mine = make_staging(tmp_path)
    assert code_of(forked(mine.close)) == 0
    assert mine.folder.is_dir()
    mine.close()
    assert names(tmp_path) == []


# ---- what a folder gets, and what it keeps ----


def test_amending_replaces_the_folder_at_once_or_not_at_all(tmp_path: Path) -> None:
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

    with pytest.raises(RuntimeError, match="stopped"):
        change(fails=True)
    assert (out / "report").read_text() == "old"
    change(fails=False)
    check_manifest(out)
    assert (out / "report").read_text() == "new"
    assert (out / "onnx" / "graph").stat().st_ino == inode
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_rights_are_those_that_the_umask_leaves(tmp_path: Path, mask: int) -> None:
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


def test_a_folder_goes_from_one_moment_to_the_next(tmp_path: Path, inside: Inside) -> None:
    (tmp_path / "run" / "a").mkdir(parents=True)
    inside.spoil("mptk.files.staging.remove_tree", lambda _: (tmp_path / "run").exists() and 1 / 0)
    discard(tmp_path / "run")
    assert names(tmp_path) == []


# ---- links and sources ----


def test_no_planted_link_is_followed(tmp_path: Path) -> None:
    """Nor is a folder of somebody else's taken for ours."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("theirs")
    place = tmp_path / "place"
    place.mkdir()
    for name in ("report.json", "report.json.tmp", f"report.json.{os.getpid()}.tmp"):
        (place / name).symlink_to(tmp_path / "victim" / "file")
    with pytest.raises(MptkError, match=r"cannot write .*report\.json: .*; it is a symbolic link; give the place"):
        write_text(place / "report.json", "mine")
    write_file(place / "report.json", lambda file: file.write_text("mine"))
    assert (place / "report.json").read_text() == "mine"
    assert not (place / "report.json").is_symlink()
    (place / "out").symlink_to(tmp_path / "victim")
    with pytest.raises(MptkError, match="is a symbolic link; give the folder that it leads to"):
        write(place / "out", "mine")
    (place / ".new.mptk").symlink_to(tmp_path / "victim")
    tidy(place)
    with pytest.raises(MptkError, match="is not your folder; remove it"):
        write(place / "new", "mine")
    assert (tmp_path / "victim" / "file").read_text() == "theirs"
    assert names(tmp_path / "victim") == ["file"]


def test_a_pipe_is_written_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = forked(lambda: write_text(tmp_path / "pipe", "x"))
    assert (tmp_path / "pipe").read_text() == "x"
    assert code_of(writer) == 0
    assert names(tmp_path) == ["pipe"]


def test_what_is_read_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "out", "model")
    for source in ("out", "out/file", str(tmp_path / "out")):
        with pytest.raises(MptkError, match=r"is what is read, and .* would replace it; give another --out"):
            check_apart(Path("out"), source)
    check_apart(Path("new"), "out", "some/hub-model")
    for inside in ("out/inside", "out/new/inside", "new/../out/inside"):
        with pytest.raises(MptkError, match=r"lies in out, which is read; give another --out"):
            check_apart(Path(inside), "out")


# ---- the system says no ----


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "No space left on device; free some space"),
        (errno.EDQUOT, "Disk quota exceeded; free some space"),
        (errno.EROFS, "Read-only file system; give a place that can be written"),
        (errno.EACCES, "Permission denied; check the rights"),
        (errno.ENAMETOOLONG, "File name too long; give a shorter name"),
    ],
)
def test_the_real_cause_is_named(tmp_path: Path, number: int, remedy: str) -> None:
    write(tmp_path / "out", "earlier")

    def refused(real: Callable[..., int], *given: object, **at: object) -> int:
        if given[1:] and isinstance(given[1], int) and not given[1] & os.O_CREAT:
            return real(*given, **at)  # it only reads
        raise OSError(number, os.strerror(number))

    for call in ("fill", "mkdir", "rename", "open"):
        with changed() as inside:
            inside.around("mptk.files.replace._swap_names", refused)
            if call != "fill":
                inside.around(f"os.{call}", refused)
            with pytest.raises(MptkError) as raised:
                write(tmp_path / "out", "new")
        assert str(raised.value).startswith(f"cannot write {tmp_path / 'out'}: {remedy}"), call
        assert (tmp_path / "out" / "file").read_text() == "earlier"
        tidy(tmp_path)
        assert names(tmp_path) == ["out"]


def test_an_error_about_another_file_names_that(tmp_path: Path) -> None:
    def read(path: Path) -> None:
        with publish(tmp_path / "out"):
            path.read_text()

    with pytest.raises(MptkError, match=rf"^{tmp_path}/source: No such file or directory; check this file"):
        read(tmp_path / "source")
    assert names(tmp_path) == []


# ---- what is the user's own ----


@pytest.fixture
def output(tmp_path: Path) -> Path:
    with publish(tmp_path / "out") as new:
        (new / "onnx").mkdir()
        (new / "onnx" / "model.onnx").write_text("1")
        (new / "README.md").write_text("1")
    return tmp_path / "out"


def again(folder: Path, *, overwrite: bool = False) -> None:
    with publish(folder, overwrite=overwrite) as new:
        (new / "onnx").mkdir()
        (new / "onnx" / "model.onnx").write_text("2")


def test_an_output_with_files_of_the_user_is_refused(output: Path) -> None:
    mine = others(output)
    message = (
        rf"^{output} holds NOTES\.txt, checkpoint-finetuned, empty, link, onnx/mine\.onnx and 1 more, which mptk did not "
        "write; give another --out, or add --overwrite, which keeps them and replaces the rest$"
    )
    with pytest.raises(MptkError, match=message):
        again(output)
    assert {name: (output / name).read_text() for name in mine} == mine
    assert (output / "onnx" / "model.onnx").read_text() == "1"


@pytest.mark.parametrize("exchange", [True, False])
def test_overwrite_leaves_files_of_the_user_where_they_are(output: Path, inside: Inside, exchange: bool) -> None:
    if not exchange:
        inside.gives("mptk.files.replace._swap_names", False)
    mine = others(output)
    (output / "README.md").write_text("changed")
    for _ in range(2):
        again(output, overwrite=True)
        assert {name: (output / name).read_text() for name in mine} == mine
        assert (output / "onnx" / "model.onnx").read_text() == "2"
        assert (output / "empty").is_dir()
        assert (output / "link").is_symlink()
        assert stat.S_IMODE((output / "run.sh").stat().st_mode) == 0o700
        assert not (output / "README.md").exists()
    assert set(read_manifest(output)) == {"onnx/model.onnx"}
    assert names(output.parent) == ["out"]


def test_a_file_that_comes_during_a_run_stays(output: Path) -> None:
    with publish(output) as new:
        (new / "README.md").write_text("2")
        (output / "NOTES.txt").write_text("mine")
    assert (output / "NOTES.txt").read_text() == "mine"
    assert (output / "README.md").read_text() == "2"


def test_a_file_of_the_user_is_not_overwritten_by_one_of_that_name(output: Path) -> None:
    (output / "plan.json").write_text("mine")
    message = r"plan\.json is not mptk's, and the new result has that name, too; move it"
    with pytest.raises(MptkError, match=message), publish(output, overwrite=True) as new:
        (new / "plan.json").write_text("2")
    assert (output / "plan.json").read_text() == "mine"
    assert names(output.parent) == ["out"]


def test_a_changed_file_of_mptk_is_the_users_work_too(output: Path) -> None:
    (output / "README.md").write_text("my own words")
    with pytest.raises(MptkError, match=r"holds README\.md, changed since mptk wrote it; give another --out, or add"):
        again(output)
    assert (output / "README.md").read_text() == "my own words"


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    "marker", ['{"format": "mptk-output/1"}', '{"format": "mptk-output/1", "files": []}', "{}", None]
)
def test_a_marker_that_lists_nothing_makes_no_output(tmp_path: Path, marker: str | None, overwrite: bool) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "thesis.txt").write_text("irreplaceable")
    if marker is not None:
        (folder / "mptk.json").write_text(marker)
    with pytest.raises(MptkError, match=r"exists and was not made by mptk; give another --out, or remove it yourself"):
        again(folder, overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == "irreplaceable"


def test_a_folder_that_only_has_the_name_of_an_unfinished_run_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(
        MptkError, match=r"out\.run is not an unfinished run of this version .*; give another --out, or rename"
    ):
        check_unfinished(tmp_path / "out", {}, resume=False)


# ---- the cache of exports ----


def exports(inside: Inside, graph: Callable[[Path], bytes]) -> None:
    """An export takes no time; what it writes is ``graph`` of the model's folder."""

    def export(
        real: object, form: object, dense: Path, plan: object, samples: object, folder: Path, log: object
    ) -> None:
        folder.mkdir()
        (folder / "model.onnx").write_bytes(graph(dense))

    inside.around(f"{api.__name__}.export_form", export)
    inside.around(f"{api.__name__}._load_dense", lambda real, model, *settings: (Path(model), None))


def test_an_export_of_other_content_is_never_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: Inside
) -> None:
    """Whatever its path and its times say."""
    monkeypatch.setenv("MPTK_CACHE", str(tmp_path / "cache"))
    exports(inside, lambda model: (model / "model.safetensors").read_bytes())
    model, times = tmp_path / "model", time.time_ns()
    model.mkdir()
    (model / "config.json").write_text("{}")
    seen: list[Path] = []
    for value in (1.0, 2.0, 1.0):
        save_file({"x": torch.full((2,), value)}, model / "model.safetensors")
        os.utime(model / "model.safetensors", ns=(times, times))
        seen.append(api.find_onnx_folder(str(model)))
        assert (seen[-1] / "model.onnx").read_bytes() == (model / "model.safetensors").read_bytes()
    assert seen[0] == seen[2] != seen[1]
    (model / "config.json").write_text("{ }")
    assert api.find_onnx_folder(str(model)) not in seen


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: Inside) -> Callable[[], Path]:
    """Gives the cached export of a model, whose graph is in truth the word ``graph``."""
    monkeypatch.setenv("MPTK_CACHE", str(tmp_path / "cache"))
    exports(inside, lambda model: b"graph")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({"x": torch.zeros(2)}, tmp_path / "model" / "model.safetensors")
    return lambda: api.find_onnx_folder(str(tmp_path / "model"))


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
def test_a_damaged_or_foreign_export_is_made_anew(
    exported: Callable[[], Path], damage: Callable[[Path], object]
) -> None:
    folder = exported()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    damage(folder)
    assert exported() == folder
    assert (folder / "model.onnx").read_bytes() == b"graph"
    assert sorted(file.name for file in folder.iterdir()) == ["model.onnx", "mptk.json"]


def test_users_of_one_cache_have_exports_of_their_own(exported: Callable[[], Path]) -> None:
    mine = exported()
    with changed() as inside:
        inside.gives("os.geteuid", 4321)
        yours = mine.with_name(mine.name.rpartition("-")[0] + "-4321")
        yours.mkdir()  # by somebody else: the number of this process's user is another
        with pytest.raises(MptkError, match=rf"^{yours} belongs to another user; remove it, or set MPTK_CACHE"):
            exported()
    assert exported() == mine
