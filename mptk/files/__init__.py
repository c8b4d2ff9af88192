"""files: the one place where files are written, replaced and removed (SECURITY.md says what is promised)."""

from mptk.files.marks import is_of, make_mark, read_mark
from mptk.files.places import check_way, hold_open, is_own
from mptk.files.replace import (
    discard,
    fill_folder,
    json_text,
    make_marked,
    put_folder,
    put_made,
    write_file,
    write_json,
    write_result,
    write_text,
    write_together,
)
from mptk.files.staging import Staging, check_open_files, check_scratch, claimed, scratch, staged, tidy, tidy_scratch
from mptk.files.writing import cannot_write, check_text, path_of, writing

__all__ = [
    "Staging",
    "cannot_write",
    "check_open_files",
    "check_scratch",
    "check_text",
    "check_way",
    "claimed",
    "discard",
    "fill_folder",
    "hold_open",
    "is_of",
    "is_own",
    "json_text",
    "make_mark",
    "make_marked",
    "path_of",
    "put_folder",
    "put_made",
    "read_mark",
    "scratch",
    "staged",
    "tidy",
    "tidy_scratch",
    "write_file",
    "write_json",
    "write_result",
    "write_text",
    "write_together",
    "writing",
]
