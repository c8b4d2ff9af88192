"""replace: files and folders get their names when they are complete; what was there before goes at that moment."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from mptk.errors import OutputError
from mptk.files.outputs import make_write_error
from mptk.files.places import (
    PLAIN_FILE,
    find_exposed,
    hold_open,
    is_in,
    is_of,
    is_own,
    make_mark,
    read_mark,
    read_state_in,
)
from mptk.files.staging import NEW, OLD, Staging, make_scratch, make_staging, stage_openly, tidy

# The flag of renameat2(2), which Python has no function for; and its errors if the kernel or the file system lacks it.
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path, then rename the file to ``path``.

    If ``write`` fails, ``path`` stays as it was. Several processes may write the same path. A link at ``path`` is
    replaced, not followed.

    Raises:
        OSError: the file cannot be renamed. Errors of ``write`` pass through.
    """
    with contextlib.ExitStack() as stack:
        # ``write`` takes a path. If other users could lead the path beside ``path`` elsewhere, the file is made among
        # the temporary files, and copied by descriptors.
        exposed = find_exposed(path.parent) is not None
        staging = stack.enter_context(stage_openly(path.parent) if exposed else make_staging(path.parent))
        made = stack.enter_context(make_scratch()) if exposed else staging
        write(made.folder / path.name)
        set_ordinary_rights(made)
        if exposed:
            _copy_into(staging, made, path.name)
        staging.put(path.name)


@contextlib.contextmanager
def write_together(folder: Path, *names: str) -> Iterator[Path]:
    """Give a temporary folder for the files ``names``. If nothing fails, they move to ``folder`` in this order.

    Name a file last if it refers to the others. Other files in ``folder`` stay.
    """
    tidy(folder)
    with make_staging(folder) as staging:
        yield staging.folder
        set_ordinary_rights(staging)
        for name in names:
            staging.put(name)


def put_folder(staging: Staging, target: Path, kept: Iterable[str] = ()) -> None:
    """Give the staging folder's ``new`` the name ``target``, beside it; an earlier folder of that name is removed.

    ``kept``: files and folders in the earlier one that stay as and where they are.

    At every moment the earlier or the new folder is there, if the system can exchange two names at once. If not, the
    earlier one is kept aside for a moment; if the process dies in it, ``tidy`` puts it back.
    """
    set_ordinary_rights(staging)
    name, at, own = target.name, staging.place.at, staging.place.own
    # A link was refused before the run; one that is there now was planted since.
    earlier = is_in(at, name)
    if earlier and stat.S_ISLNK(read_state_in(at, name).st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(target))
    for each in kept:
        _carry(target / each, staging.folder / each)
    # A rename replaces an empty folder by itself.
    if earlier:
        with hold_open(name, at) as folder:
            earlier = bool(os.listdir(folder))
    # Last, since all before took time: does the path still lead to the folder that was filled?
    staging.check()
    if not earlier:
        os.rename(NEW, name, src_dir_fd=own, dst_dir_fd=at)
    elif not _swap_names(NEW, name, own, at):
        # For a moment nothing has the name.
        os.rename(name, OLD, src_dir_fd=at, dst_dir_fd=own)
        try:
            os.rename(NEW, name, src_dir_fd=own, dst_dir_fd=at)
        except OSError:
            os.rename(OLD, name, src_dir_fd=own, dst_dir_fd=at)
            raise
    # The result is in its place. What cannot be removed of the earlier folder, named ``new`` now, is left to ``tidy``.
    with contextlib.suppress(OSError):
        staging.renew()


def put_made(staging: Staging, target: Path, mode: int | None = None) -> None:
    """Move what was made in the staging folder under ``target``'s name to ``target``, which is not there yet.

    ``mode``: its rights, if they are not the ordinary ones.
    """
    set_ordinary_rights(staging)
    if mode is not None:
        os.chmod(f"{NEW}/{target.name}", mode, dir_fd=staging.place.own)
    staging.put(target.name)


def fill_folder(folder: Path, source: Path) -> None:
    """Fill an empty folder with links to the files of another one, or with copies where there can be no links."""
    shutil.copytree(source, folder, symlinks=True, dirs_exist_ok=True, copy_function=_link)


def make_marked(folder: Path, mark: str) -> None:
    """Make a folder that has mptk's mark, the file ``mark``, from its first moment.

    Raises:
        OSError: another has its name, or it cannot be made.
    """
    with make_staging(folder.parent) as staging:
        own = staging.place.own
        # Others may read it, but not write in it, whatever the umask says.
        os.chmod(NEW, read_state_in(own, NEW).st_mode & 0o755, dir_fd=own)
        with hold_open(NEW, own) as new:
            make_mark(new, mark, folder.name)
        staging.check()
        os.rename(NEW, folder.name, src_dir_fd=own, dst_dir_fd=staging.place.at)


def discard(folder: Path, mark: str | None = None) -> None:
    """Remove a folder of this user at once: no half of it is ever left under its name.

    ``mark``: the file in it that must hold mptk's mark.

    Raises:
        MptkError: it is another user's, or has no such mark.
    """
    with make_staging(folder.parent) as staging, hold_open(folder.name, staging.place.at) as own:
        if not is_own(os.fstat(own)) or (mark is not None and not is_of(read_mark(own, mark), own, folder.name)):
            raise OutputError(f"{folder} was not made by mptk; remove it yourself", name=folder)
        # It is renamed into the staging folder, which is then removed. A rename takes whatever has the name at that
        # moment, so what was taken is compared with what was opened.
        aside = f"{NEW}/{folder.name}"
        os.rename(folder.name, aside, src_dir_fd=staging.place.at, dst_dir_fd=staging.place.own)
        if not os.path.samestat(os.fstat(own), read_state_in(staging.place.own, aside)):
            staging.put(folder.name)
            raise OutputError(
                f"{folder} was replaced while it was to be removed, and is left as it is; look at it", name=folder
            )


def set_ordinary_rights(staging: Staging) -> None:
    """Give everything that was made in a staging folder the rights that the user's umask leaves.

    Libraries that write through temporary files make them private.
    """
    # ``new`` was made with these rights. ``os.umask`` can tell the umask only by setting it, for all threads.
    wanted = read_state_in(staging.place.own, NEW).st_mode & 0o777
    for _, folders, files, at in os.fwalk(NEW, dir_fd=staging.place.own):
        for names, mode in ((folders, wanted), (files, wanted & 0o666)):
            for name in names:
                state = read_state_in(at, name)
                # A file with several links is one of the earlier output, and keeps its rights.
                linked = stat.S_ISREG(state.st_mode) and state.st_nlink > 1
                if not linked and not stat.S_ISLNK(state.st_mode) and state.st_mode & 0o777 != mode:
                    os.chmod(name, mode, dir_fd=at)


def _copy_into(staging: Staging, made: Staging, name: str) -> None:
    """Copy a file from one staging folder into another, by descriptors."""
    rights = read_state_in(made.place.own, f"{NEW}/{name}").st_mode & 0o777
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | PLAIN_FILE
    with (
        open(os.open(f"{NEW}/{name}", os.O_RDONLY | PLAIN_FILE, dir_fd=made.place.own), "rb") as source,
        open(os.open(f"{NEW}/{name}", flags, rights, dir_fd=staging.place.own), "wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)


def _carry(source: Path, place: Path) -> None:
    """Link a file, or the files of a folder, at a new path; copy them if the file system has no links."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(place):
        raise OutputError(
            f"{source} is not mptk's, and the new result has that name, too; move it, and run again", name=source
        )
    if source.is_symlink():
        place.symlink_to(source.readlink())
    elif source.is_dir():
        place.mkdir()
        fill_folder(place, source)
    else:
        _link(str(source), str(place))


def _swap_names(one: str, two: str, one_at: int, two_at: int) -> bool:
    """Exchange two names, each in an open folder, at once. False if the kernel or the file system cannot."""
    # By ctypes, from the C library of this process. Older ones lack the function.
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if not call(one_at, os.fsencode(one), two_at, os.fsencode(two), _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), two)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


# ---- single results: JSON, text, whatever a function writes ----


def format_json(
    content: object,
    *,
    indent: int | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = True,
    separators: tuple[str, str] | None = None,
) -> str:
    """``content`` as JSON. NaN and infinity become null, since JSON has neither. Options: of ``json.dumps``."""
    return json.dumps(
        _replace_infinite(content),
        allow_nan=False,
        indent=indent,
        sort_keys=sort_keys,
        ensure_ascii=ensure_ascii,
        separators=separators,
    )


def write_json(path: Path | None, content: object) -> None:
    """Write a result as JSON; nothing if ``path`` is None."""
    if path is not None:
        write_text(path, format_json(content, indent=1) + "\n")


def write_text(path: Path, content: str) -> None:
    """``write_result`` of a text, in UTF-8."""
    write_result(path, lambda file: file.write_text(content, encoding="utf-8"))


def write_result(path: Path, write: Callable[[Path], object]) -> None:
    """``write_file`` for a path that a user named. Its folder is made if missing.

    Raises:
        MptkError: it cannot be written, or is a symbolic link.
    """
    try:
        if path.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            write(path)  # a device or a pipe, such as /dev/stdout: nothing may replace it
        else:
            write_file(path, write)
    except OSError as error:
        raise make_write_error(path, error) from error


def _replace_infinite(content: object) -> object:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _replace_infinite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_replace_infinite(value) for value in content]
    return content
