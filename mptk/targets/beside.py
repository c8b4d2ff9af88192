"""beside: write and check the files that other programs read beside weights and graphs."""

from __future__ import annotations

import filecmp
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import NoReturn

from safetensors import safe_open

from mptk.errors import ProofError
from mptk.files import make_scratch
from mptk.io import Loaded, copy_processors, list_other_files, read_object, save_tokenizer
from mptk.publish.manifest import compute_digests, list_files
from mptk.tasks.runtimes import CONFIG_KEY

READ = ("*token*", "vocab*", "merges*", "*.model", "*chat_template*", "*chat_templates/*", "*processor_config.json")
"""Files that a tokenizer or a processor reads if they exist."""


def check_beside(folder: Path, write: Callable[[Path], object], *, all_known: bool = True) -> None:
    """Raise ProofError unless the files that ``write`` makes are in ``folder``, equal, JSON field by field.

    ``all_known``: whether a tokenizer or a processor may read no other files.
    """
    # The expected files are made anew, so nothing in ``folder`` is taken at its word.
    with make_scratch() as place:
        write(place.folder)
        names = list_files(place.folder)
        for name in names:
            _check_same(name, folder / name, place.folder / name)
    # One more file may change how a tokenizer reads, although every other file is right.
    if not all_known:
        return
    more = sorted({path.relative_to(folder).as_posix() for pattern in READ for path in folder.glob(pattern)} - {*names})
    if more:
        fail(f"{more[0]} is not a file of the dense model")


def _check_same(name: str, file: Path, expected: Path) -> None:
    if not file.is_file():
        fail(f"{name} is missing")
    if filecmp.cmp(file, expected, shallow=False):  # the bytes; JSON may also differ in its layout
        return
    if file.suffix == ".json":
        compare(name, read_object(file), read_object(expected))
    else:
        fail(f"{name} is not the dense model's")


def write_beside(loaded: Loaded, folder: Path, *, same_features: bool) -> None:
    """Write the files beside the weights of a model: the tokenizer's and the processors'."""
    if loaded.tokenizer is not None:
        save_tokenizer(loaded.tokenizer, folder)
    copy_processors(loaded.path, folder, same_features=same_features)


def write_pipeline(loaded: Loaded, folder: Path) -> None:
    """Copy the other parts of a model's pipeline, if it has one: ``folder`` is then a whole pipeline."""
    for name, file in list_other_files(loaded.path).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def check_pipeline(loaded: Loaded, folder: Path) -> None:
    """Raise ProofError unless the other parts are as in the dense model's pipeline."""
    known = list_other_files(loaded.path)
    for name in known:
        if not (folder / name).is_file():
            fail(f"{name} is missing")
    # All digests in one call, which reads several files at a time.
    digests = compute_digests([*known.values(), *(folder / name for name in known)])
    for name, one, other in zip(known, digests, digests[len(known) :], strict=False):
        if one != other:
            fail(f"{name} is not the dense pipeline's")


WeightFile = tuple[frozenset[str], Mapping[str, str]]
"""The names of a file's tensors, and what its header says beside them."""
UNCHECKED = frozenset({"transformers_version", CONFIG_KEY})
"""Fields that only say who wrote a file, and the fields that follow from the graphs (``check_written_config``)."""


def check_keys(name: str, found: JsonObject, expected: JsonObject) -> None:
    """Raise ProofError if a JSON file has a field that mptk does not write, or another value in one.

    A loader may act on a field that the class of the config drops when it is loaded. What is missing has its default.
    """
    there = dict(walk_fields(expected))
    for path, value in walk_fields({key: value for key, value in found.items() if key not in UNCHECKED}):
        require(name, path, value, there.get(path, MISSING))


def check_weight_files(folder: Path, expected: Mapping[str, WeightFile]) -> None:
    """Raise ProofError if a file of weights has another tensor than mptk writes, or another header."""
    for name, (tensors, metadata) in expected.items():
        if not (folder / name).is_file():
            fail(f"{name} is missing")
        with safe_open(folder / name, "pt") as opened:
            there, said = frozenset(opened.keys()), opened.metadata() or {}
        if there != tensors:
            fail(f"{min(there ^ tensors)} is {'missing in' if tensors - there else 'a tensor too many in'} {name}")
        compare(f"the header of {name}", said, metadata)


CONFIG_STAGE = "config"
"""The proof's name for the comparison of files."""
MISSING = object()
"""Of a field that is not there. None would be a value of JSON."""
LISTED = 8
"""A longer list is compared element by element, so that the message names the first difference."""
CHARACTERS_SHOWN = 60
"""Characters of a value that an error shows."""
JsonObject = Mapping[str, object]


def compare(file: str, found: JsonObject, expected: JsonObject, listed: Set[str] = frozenset()) -> None:
    """Raise ProofError, with file and field, unless all fields outside the ``listed`` ones are equal."""
    one, other = dict(walk_fields(found)), dict(walk_fields(expected))
    for path in sorted(one.keys() | other.keys()):
        if not any(path == name or path.startswith(f"{name}.") for name in listed):
            require(file, path, one.get(path, MISSING), other.get(path, MISSING))


def require(file: str, field: str, found: object, expected: object) -> None:
    """Raise ProofError unless a field has the expected value and type."""
    # Python says True == 1 == 1.0, but programs read them as other things.
    if type(found) is not type(expected) or found != expected:
        fail(
            f"{field} of {file} is {_format_field(found)}, but {_format_field(expected)} in the dense model cut to "
            "the plan",
            () if expected is MISSING else (expected,),
        )


def fail(what: str, nearest: Sequence[object] = ()) -> NoReturn:
    """Raise the ProofError of this stage. ``nearest``: the right value of a field."""
    raise ProofError(
        f"the proof fails at '{CONFIG_STAGE}': {what}; do not use it, and prune the model again",
        name=CONFIG_STAGE,
        nearest=nearest,
    )


def walk_fields(body: JsonObject, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted path → value of each field that is not an object with fields of its own."""
    for key, value in body.items():
        inner = _list_inner_fields(value)
        if inner:
            yield from walk_fields(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _list_inner_fields(value: object) -> JsonObject:
    """The fields of an object, and of a long list or a list of objects; empty for other values."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list) and (len(value) > LISTED or any(isinstance(each, Mapping) for each in value)):
        return dict(zip(map(str, range(len(value))), value, strict=True))
    return {}


def _format_field(value: object) -> str:
    text = "missing" if value is MISSING else json.dumps(value, default=str)
    return text if len(text) <= CHARACTERS_SHOWN else f"{text[: CHARACTERS_SHOWN - 3]}..."
