"""loaders: the forms in which models come beside checkpoint folders of transformers.

``models`` reads folders of safetensors and hub ids. Every other name, file or folder has a loader, which a feature
brings: a loader says what it takes, and makes a checkpoint folder of it, or reads the folder's config and class itself.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mptk.errors import FileError, InputError, ModelError, MptkError, list_close_names
from mptk.files import expand_path, tidy
from mptk.plugins import load_parts
from mptk.reading import Json, check_inside, make_damage_error, read_json_object
from mptk.trust import Trust

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Loader:
    """A form in which models come. A loader overrides what it has; all else is as of a plain checkpoint folder.

    Commands that need no model ask loaders, too: a method imports what is heavy itself.

    Attributes:
        priority: of several loaders that take a model, the one with the highest has it.
        conversion: 0 if what it takes is a checkpoint folder. Else that is converted to one, which is kept in the
            cache: raise the number if the same file is now converted differently.
        endings: of the names of files that it takes. A file is always converted.
        library: what loads the models that it has classes for.
        config_fields: of a config.json: it loads only folders whose config has one of these.
        code: Python files that are written into folders. mptk runs them from here, and never from such a folder.
    """

    priority = 0
    conversion = 0
    endings: tuple[str, ...] = ()
    library = "transformers"
    config_fields: Sequence[str] = ("model_type", "auto_map")
    code: Sequence[Path] = ()

    # ---- names that stand for a file or a folder ----

    @property
    def names(self) -> str:
        """What names it knows, in a sentence: "packaged alias (…)"."""
        return ""

    @property
    def aliases(self) -> Sequence[str]:
        """The names that it knows, if they can be listed."""
        return ()

    def takes_name(self, name: str) -> bool:
        """Whether ``name`` is one of its names."""
        return False

    def find_local_copy(self, name: str) -> Path | None:
        """The file or folder of a name that it knows; None if it would have to be downloaded."""
        return None

    def fetch(self, name: str) -> Path:
        """The file or folder of a name that it knows, downloaded if necessary. A loader with names overrides it.

        Raises MptkError if it cannot be downloaded.
        """
        raise NotImplementedError

    def find_licence(self, name: str) -> str:
        """The licence of the model of a name that it knows."""
        return ""

    # ---- files and folders ----

    def takes(self, folder: Path) -> bool:
        """Whether it loads the model in ``folder``, whose files were checked (``untrusted.check_folder``)."""
        return False

    def check_file(self, file: Path) -> None:
        """Raise MptkError unless a file is what its ending says."""

    def explain_folder(self, model: str, folder: Path) -> str:
        """Why a folder without a config is no model, if it is known. ``model``: its name as the user gave it."""
        return ""

    def count_layers(self, path: Path) -> int | None:
        """The number of layers of the model at ``path``, read without torch; None if no known field gives it."""
        return _find_number(_read_plain_config(path), LAYER_FIELDS)

    def count_positions(self, path: Path) -> int | None:
        """The positions of the decoder of text at ``path``, read without torch; None if no known field gives them."""
        config = _read_plain_config(path)
        named = config.get("architectures")
        is_decoder = isinstance(named, list) and any(str(name).endswith("ForCausalLM") for name in named)
        return _find_number(config, POSITION_FIELDS) if is_decoder else None

    def read_config(self, path: Path, trust: Trust) -> PreTrainedConfig:
        """The config of a file or folder that it takes. Nothing is converted for it."""
        from transformers import AutoConfig

        register_all_classes()
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust.allows_code)
        return config

    def explain_conversion(self, model: str, path: Path) -> str:
        """A note on the conversion for the report. Raises MptkError if ``path`` cannot be converted."""
        return ""

    def convert(self, path: Path, folder: Path) -> None:
        """Write what it takes as a checkpoint of floats into the new ``folder``. Loaders that convert override it."""
        raise NotImplementedError

    def list_other_files(self, folder: Path) -> Mapping[str, Path]:
        """The files that a model brings beside its folder: name in the folder of the result → file."""
        return {}

    def name_whole_class(self, folder: Path) -> str:
        """The class that opens a whole folder of the result, if that is more than the model."""
        return ""

    # ---- classes ----

    def register_classes(self) -> None:
        """Make classes known to transformers' auto classes."""

    def find_class(self, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
        """The class for a config that transformers has no class for."""
        return None


CONFIG = "config.json"
LEAST_LIKENESS = 0.8
"""How much a misspelt name is like the right one at least, from 0 to 1."""
REPORT = "report.json"
MADE = ("mptk.json", REPORT, "plan.json")
"""Files of folders that mptk made. One of them may be lost; with none of them a folder is somebody else's."""
LAYER_FIELDS = ("num_hidden_layers", "n_layer", "num_layers")
"""Fields of a config that give the number of layers."""
POSITION_FIELDS = ("max_position_embeddings", "n_positions")
"""Fields of a config that give the longest text."""
_LOCAL = re.compile(r"^[./~]|/.*/")
"""Names that no model of a hub has."""
PLAIN_CHECKPOINTS = Loader()
"""Of checkpoint folders of transformers."""


def _read_plain_config(path: Path) -> Json:
    """The config of a checkpoint folder; empty if there is none, or a damaged one, which is named when it is opened."""
    try:
        return read_json_object(path / CONFIG, make_damage_error(path / CONFIG))
    except MptkError:
        return {}


def _find_number(config: Json, names: Sequence[str]) -> int | None:
    found = next((config[name] for name in names if name in config), None)
    return found if isinstance(found, int) else None


def list_loaders() -> list[Loader]:
    """The installed features' loaders, in the order in which they are asked."""
    found: Sequence[Loader] = list(load_parts("loaders").values())
    return sorted(found, key=lambda loader: -loader.priority)


@functools.cache
def register_all_classes() -> None:
    """Make the classes of all loaders known to transformers, before the first config is read."""
    for loader in list_loaders():
        loader.register_classes()


def choose_loader(path: Path) -> Loader:
    """The loader of a file or of a checked folder; ``PLAIN_CHECKPOINTS`` if none takes it."""
    if not path.is_dir():
        return find_file_loader(str(path)) or PLAIN_CHECKPOINTS
    return next((loader for loader in list_loaders() if loader.takes(path)), PLAIN_CHECKPOINTS)


def find_file_loader(name: str) -> Loader | None:
    """The loader that takes files of such a name, whether or not there is one; None for other names."""
    return next((loader for loader in list_loaders() if name.lower().endswith(loader.endings)), None)


def find_naming_loader(name: str) -> Loader | None:
    """The loader that knows a name; None for paths and hub ids."""
    return next((loader for loader in list_loaders() if loader.takes_name(name)), None)


def find_local_copy(name: str) -> Path | None:
    """The file or folder of a name that a loader knows, if it is on this machine."""
    loader = find_naming_loader(name)
    return None if loader is None else loader.find_local_copy(name)


def find_named_licence(name: str) -> str:
    """The licence of the model of a name that a loader knows; empty for other names."""
    return (find_naming_loader(name) or PLAIN_CHECKPOINTS).find_licence(name)


def count_layers(model: str | Path) -> int | None:
    """The number of layers of a model on this machine, read without torch; None if that is not known."""
    found = _find_place(model)
    return None if found is None else found[0].count_layers(found[1])


def count_positions(model: str | Path) -> int | None:
    """The positions of a decoder of text on this machine, read without torch; None if they are not known."""
    found = _find_place(model)
    return None if found is None else found[0].count_positions(found[1])


def _find_place(model: str | Path) -> tuple[Loader, Path] | None:
    """The loader, and the file or folder, of a model on this machine; None if it is not here."""
    place = find_local_copy(str(model)) or expand_path(model)
    if not place.exists():
        return None
    loader = find_file_loader(str(place)) if place.is_file() else None
    return loader or PLAIN_CHECKPOINTS, place


def check_model_name(model: str) -> Path:
    """``model`` as a path. No hub is asked, and torch is not imported: a misspelt name is to cost no time.

    Raises:
        InputError: nothing can have this name.
        FileError: it can only be a file's or a folder's, and there is none; or it is almost a name that a loader knows.
    """
    # Whether a name can be a path's, only the system knows: ask whether it exists.
    try:
        path = expand_path(model)
        path.exists()
    except (OSError, ValueError) as error:  # too long; a null character
        raise InputError(
            f"{model!r} cannot be a model's name: {error}; give a folder, a file, an alias or a hub id", name=model
        ) from error
    if not model or "\0" in model:
        raise InputError(f"{model!r} cannot be a model's name; give a folder, a file, an alias or a hub id", name=model)
    tidy(path.parent)  # a killed process may have left this folder renamed aside
    if os.path.lexists(path) or find_naming_loader(model) is not None:
        return path
    if find_file_loader(model) is not None or path.suffix == ".onnx":
        raise FileError(f"there is no file {model}; check the path", name=model)
    if _LOCAL.search(model):
        raise FileError(f"there is no folder {model}; check the path", name=model)
    known = [name for loader in list_loaders() for name in loader.aliases]
    # A hub id is OWNER/NAME. The few without an owner are old, and like no alias.
    if "/" not in model and (close := list_close_names(model, known, cutoff=LEAST_LIKENESS)):
        raise FileError(f"there is no model {model!r}; did you mean {close[0]!r}?", name=model, nearest=close)
    return path


def check_local_model(model: str, path: Path) -> None:
    """Raise MptkError unless a file or folder on this machine can be a model, as far as that is known without torch."""
    if (loader := find_file_loader(model)) is not None:
        if not path.is_file():
            raise FileError(f"{model} is no file; check the path", name=model)
        loader.check_file(path)
        return
    files = list_file_forms()
    if path.is_dir():
        config = path / CONFIG
        if not os.path.lexists(config) or config.is_dir():
            forms = " or a ".join(["transformers checkpoint folder", *files])
            said = (loader.explain_folder(model, path) for loader in list_loaders())
            raise FileError(next(filter(None, said), f"{model} has no config.json; give a {forms}"), name=model)
        check_inside(path)  # nothing outside of the folder is opened
        content = read_json_object(config, make_damage_error(config))
        fields = [field for loader in list_loaders() for field in loader.config_fields]
        if not content.keys() & {*PLAIN_CHECKPOINTS.config_fields, *fields}:
            raise ModelError(
                f"{config} names no {PLAIN_CHECKPOINTS.config_fields[0]}, so no class is known for it; give a folder "
                "that save_pretrained wrote",
                name=model,
            )
    elif not files:
        raise make_unread_error(model)
    else:
        raise FileError(
            f"{model} is neither a checkpoint folder nor a {' nor a '.join(files)}; give one of these", name=model
        )


def list_file_forms() -> list[str]:
    """The files that the loaders take, in words: ".gguf file"."""
    return [f"{ending} file" for loader in list_loaders() for ending in loader.endings]


def make_unread_error(model: str) -> MptkError:
    """The error for a file that only a feature that is not installed reads."""
    return ModelError(f"{model}: no installed feature reads this; give a transformers checkpoint folder", name=model)


def check_folder_named(place: str | Path, makes: str) -> None:
    """Raise MptkError if ``place`` is no folder that a command made. ``makes``: the command, ``prune`` or ``export``.

    A model's name, a path without a folder, and a dense model where a pruned one is needed are each named as such.
    """
    path, command = expand_path(place), f"`mptk {makes} {place} --out DIR`"
    if not (path.exists() or path.is_symlink()):  # raises an error for a name that is too long
        if find_naming_loader(str(place)) is not None:
            raise FileError(f"{place} is a model's name, and here a folder is needed; {command} makes one", name=place)
        raise FileError(f"there is no folder {place}; check the path", name=place)
    if makes == "prune" and path.is_dir() and not is_made(path):
        if (path / CONFIG).exists():
            raise FileError(
                f"{place} is a dense model, and here a pruned one is needed; {command} makes one", name=place
            )
        if not any((each / REPORT).exists() for each in path.iterdir()):  # a ladder has a folder for each size
            raise FileError(f"{place} holds no {REPORT}; give the --out folder of `mptk prune`", name=place)


def is_made(folder: Path) -> bool:
    """Whether mptk made a folder."""
    return any((folder / name).exists() for name in MADE)


def list_other_files(folder: Path) -> dict[str, Path]:
    """The files that the model in ``folder`` brings beside its folder: name in the folder of the result → file."""
    return {name: file for loader in list_loaders() for name, file in loader.list_other_files(folder).items()}


def name_whole_class(folder: Path) -> str:
    """The class that opens a whole folder of the result, if that is more than the model; else empty."""
    return next(filter(None, (loader.name_whole_class(folder) for loader in list_loaders())), "")


def list_own_code() -> list[Path]:
    """The Python files that mptk writes into folders. mptk reads them from here, so it runs no code of such folders."""
    return [file for loader in list_loaders() for file in loader.code]
