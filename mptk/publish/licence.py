"""licence: a checkpoint's licence, as its model card gives it, and the files that must travel with its weights."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

CARD = "README.md"
NOTICES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
"""Files that licences ask to pass on. They lie in the folder itself."""
# The fields of a card's header that a result takes over, and what an identifier of a licence looks like (Apache-2.0).
_FIELDS = ("license", "license_name", "license_link", "language")
_IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.\-]*")


def read_licence(folder: Path) -> dict[str, object]:
    """The licence and the languages in the model card of ``folder``; empty if there is no card, or none says so."""
    try:
        said = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError):  # a card is anybody's text
        return {}
    return {name: said[name] for name in _FIELDS if _is_plain(said.get(name))}


def make_licence_fields(licence: str) -> dict[str, object]:
    """A licence in words, as the fields of a model card: an identifier such as Apache-2.0, or a name of its own."""
    if _IDENTIFIER.fullmatch(licence):
        return {"license": licence.lower()}  # as the hub spells them
    return {"license": "other", "license_name": licence}


def write_stub(folder: Path, licence: str) -> None:
    """A model card that says the licence and nothing else, for a checkpoint that comes without one."""
    data = ModelCardData(**make_licence_fields(licence))  # type: ignore[arg-type]
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n", encoding="utf-8")


def copy_notices(source: Path, folder: Path) -> None:
    """Copy the licence and notice files of a checkpoint, as they are."""
    for file in list_notices(source):
        shutil.copyfile(file, folder / file.name)


def copy_card(source: Path, folder: Path) -> None:
    """Copy a checkpoint's model card and its licence and notice files, as they are."""
    copy_notices(source, folder)
    if (source / CARD).is_file():
        shutil.copyfile(source / CARD, folder / CARD)


def list_notices(folder: Path) -> Iterator[Path]:
    """The licence and notice files of a checkpoint folder."""
    found = {file for pattern in NOTICES for file in folder.glob(pattern) if file.is_file()}
    yield from sorted(found)


def _is_plain(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, str) for item in value)
    return isinstance(value, str) and bool(value)
