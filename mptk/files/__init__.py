"""files: the one place where files are written, replaced and removed (SECURITY.md says what is promised)."""

from mptk.files.replace import (
    discard,
    fill_folder,
    json_text,
    put_folder,
    put_made,
    write_file,
    write_json,
    write_result,
    write_text,
    write_together,
)
from mptk.files.staging import Staging, check_open_files, claimed, scratch, staged, tidy, tidy_scratch
from mptk.files.writing import cannot_write, check_text, path_of, writing

__all__ = [
    "Staging",
    "cannot_write",
    "check_open_files",
    "check_text",
    "claimed",
    "discard",
    "fill_folder",
    "json_text",
    "path_of",
    "put_folder",
    "put_made",
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
