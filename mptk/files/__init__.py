"""files: the one place where files are written, replaced and removed (SECURITY.md says what is promised)."""

from mptk.files.outputs import check_text, expand_path, make_write_error, name_write_errors
from mptk.files.places import check_way, hold_open, is_of, is_own, make_mark, read_mark
from mptk.files.replace import (
    discard,
    fill_folder,
    format_json,
    make_marked,
    put_folder,
    put_made,
    write_file,
    write_json,
    write_result,
    write_text,
    write_together,
)
from mptk.files.staging import (
    Staging,
    check_open_files,
    check_scratch,
    claim_place,
    make_scratch,
    make_staging,
    tidy,
    tidy_scratch,
)

__all__ = [
    "Staging",
    "check_open_files",
    "check_scratch",
    "check_text",
    "check_way",
    "claim_place",
    "discard",
    "expand_path",
    "fill_folder",
    "format_json",
    "hold_open",
    "is_of",
    "is_own",
    "make_mark",
    "make_marked",
    "make_scratch",
    "make_staging",
    "make_write_error",
    "name_write_errors",
    "put_folder",
    "put_made",
    "read_mark",
    "tidy",
    "tidy_scratch",
    "write_file",
    "write_json",
    "write_result",
    "write_text",
    "write_together",
]
