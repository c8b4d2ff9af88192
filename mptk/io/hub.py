"""hub: the checkpoint of a name that is not on this machine. The module imports no torch, which takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from mptk.errors import FileError, MptkError, take_first_line
from mptk.io.loaders import CONFIG, list_file_forms, list_loaders

# No subfolders, and no second copy in another format.
_IGNORED = ("*/*", "consolidated*")


def download_checkpoint(model: str, patterns: Sequence[str], *, local: bool) -> Path:
    """The folder with the files of ``model``, a hub id, that match ``patterns``. ``local``: download nothing.

    Raises:
        FileError: the hub does not have it, or cannot be asked; or ``local``, and it was never downloaded.
    """
    try:
        return Path(
            snapshot_download(model, allow_patterns=[*patterns], ignore_patterns=[*_IGNORED], local_files_only=local)
        )
    except (OSError, ValueError) as error:
        raise make_absent_error(model) if local else _make_hub_error(model, error) from error


def check_hub_id(model: str) -> None:
    """Raise FileError if the hub does not have ``model``, or cannot be asked. Downloads the config, as a run would."""
    try:
        hf_hub_download(model, CONFIG)
    except LocalEntryNotFoundError as error:
        raise _make_hub_error(model, error) from error
    except EntryNotFoundError:
        return  # it has no config: what it has instead is said when it is opened
    except (OSError, ValueError) as error:
        raise _make_hub_error(model, error) from error


def make_absent_error(model: str) -> MptkError:
    """The error if a report names a model that would have to be downloaded."""
    return FileError(f"{model} is not on this machine, and a report may not start a download; give --model", name=model)


def _make_hub_error(model: str, error: Exception) -> MptkError:
    forms = ", ".join([*(loader.names for loader in list_loaders() if loader.names), *list_file_forms()])
    return FileError(
        f"{model!r} is no {f'{forms} or ' if forms else ''}local folder, and the hub does not provide it: "
        f"{take_first_line(error)}; check the name, the network and, if it is gated, HF_TOKEN",
        name=model,
    )
