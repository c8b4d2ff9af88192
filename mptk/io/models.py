"""models: load a transformers model from a hub id, a local folder, or what a loader takes (``loaders``).

All of these first become a plain checkpoint folder. What has to be converted for it is converted once, to a safetensors
checkpoint in the cache folder (``MPTK_CACHE``, else the platform's user cache). Only safetensors are read, since a
pickle can run code. A model's own Python code runs only if the caller trusts it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mptk.arguments import guard_arguments
from mptk.errors import ChangedError, FileError, InputError, ModelError, MptkError, take_first_line
from mptk.io.auto_classes import find_class
from mptk.io.cache import build_private, locate_private_folder, read_sha256
from mptk.io.checkpoint import (
    SMALL_FILES,
    fill_parameters,
    find_quantized_dtype,
    find_stored_dtype,
    read_float_types,
)
from mptk.io.hub import download_checkpoint, make_absent_error
from mptk.io.loaders import (
    Loader,
    check_local_model,
    check_model_name,
    choose_loader,
    find_file_loader,
    find_naming_loader,
    make_unread_error,
)
from mptk.io.resident import Resident
from mptk.io.tensors import Files
from mptk.io.untrusted import PARAMETERS, check_folder, check_sizes, is_quantized
from mptk.ir import Program, Weights
from mptk.plain import hash_text
from mptk.trust import NO_CODE, Trust, trust_by_caller

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.tiktoken", "*.model")


@dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer. ``source``: its name as the user gave it. ``path``: its checkpoint folder.

    ``trust``: whether the caller lets its own Python code run. ``dtype``: the type of the stored weights; the model
    itself has the type that it was loaded in. ``weights``: if it was only opened, its parameters and saved buffers,
    read when asked for; the parameters of ``model`` are then on the meta device until ``load_all`` is called. ``live``:
    the caller holds the model in memory (``io/live.py``). ``note``: for the report; may be empty.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    path: Path
    trust: Trust = NO_CODE
    dtype: torch.dtype = torch.float32
    weights: Weights | None = None
    live: bool = False
    note: str = ""

    def load_all(self) -> PreTrainedModel:
        """``model`` with all its weights in memory."""
        if self.weights is not None:
            fill_parameters(self.model, self.weights)
        return self.model

    def with_weights(self, program: Program) -> Program:
        """``program``, which was traced from ``model``, with the checkpoint's weights."""
        return program if self.weights is None else fill_program(program, self.model, self.weights)

    def with_changes(self, changes: Weights, aliases: Mapping[str, str]) -> Loaded:
        """The model with ``changes`` of its weights. ``aliases``: other name of a tied weight → name in ``changes``."""
        own = self.weights or Weights({})
        names = {name: owner for name in own if (owner := aliases.get(name, name)) in changes}
        return replace(self, weights=own.with_entries(changes.select_names(names)))


def fill_program(program: Program, module: nn.Module, weights: Weights) -> Program:
    """``program``, which was traced from ``module``, with ``weights``; buffers that they lack are the module's."""
    buffers = dict(module.named_buffers(remove_duplicate=False))
    known = {name: weights.get_entry(name) for name in program.state if name in weights}
    return program.with_state({n: b for n, b in buffers.items() if n in program.state} | known)


@guard_arguments
def load(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    local: bool = False,
) -> Loaded:
    """Load weights and tokenizer on the CPU, in ``dtype``, in evaluation mode.

    ``model`` is, in this order: a packaged alias (``mptk models``; write ``./NAME`` for a folder of that name), a
    ``.gguf`` file, a local checkpoint folder, a hub id. The checkpoint's ``architectures`` name the class. If they name
    none, it is the causal LM, if the config has one. ``tokenizer`` is None if the checkpoint has none. ``local``:
    download nothing.

    Raises:
        MptkError: there is no such model; its weights are pickles, or lack some parameters; it needs code that is not
            trusted; or transformers cannot read the GGUF file.
    """
    return load_whole(str(model), dtype=dtype, trust=trust_by_caller(trust_remote_code), local=local)


def load_whole(
    model: str, *, dtype: torch.dtype = torch.float32, trust: Trust = NO_CODE, local: bool = False
) -> Loaded:
    """``load`` for callers that hold the user's word on code."""
    return _load(model, trust, local, dtype=dtype)


def open_weights(model: str, resident: Resident, *, trust: Trust = NO_CODE, local: bool = False) -> Loaded:
    """``load`` in float32, but weights are read when they are asked for. ``resident`` keeps what fits."""
    files = Files()
    with files.defer_reads():
        loaded = _load(model, trust, local, dtype=torch.float32)
    return replace(loaded, weights=files.open_weights(loaded.model, resident))


def _load(model: str, trust: Trust, local: bool, **options: object) -> Loaded:
    folder = _open_folder(locate(model, local=local))
    with explain_load_errors(model):
        config = _read_config(folder, trust)
    # Before any weight is read: refuse what cannot be a model, and weights that could run code.
    check_sizes(model, config)
    _refuse_pickles(folder, config)
    # Weights that only a loader reads become a checkpoint in the cache, which is loaded in their place.
    loader, note = choose_loader(folder), ""
    if loader.conversion:
        note = loader.explain_conversion(model, folder)
        folder = _convert(loader, folder)
        with explain_load_errors(model):
            config = _read_config(folder, trust)
    elif is_quantized(folder):
        raise ModelError(
            f"{model} is quantised, and no installed feature reads that; give the float checkpoint", name=model
        )
    elif (found := find_quantized_dtype(folder)) is not None:
        raise ModelError(
            f"{model} has weights of type {found}, and its config.json has no quantization_config; give the float "
            "checkpoint",
            name=model,
        )
    module = load_pretrained(folder, model, config, trust, **options)
    tokenizer = _load_tokenizer(folder, model, trust) if has_tokenizer(folder) else None
    return Loaded(module, tokenizer, model, folder, trust, find_stored_dtype(folder), note=note)


def build_skeleton(model: str, *, dtype: torch.dtype = torch.float32, trust: Trust = NO_CODE) -> PreTrainedModel:
    """The model of :func:`load` on the meta device, without weights.

    It needs only the config. A file that has not been converted to a checkpoint yet is not converted for it.
    """
    config = load_config(model, trust=trust)
    # A config may ask for weights of any size; on the meta device they take no memory.
    with explain_load_errors(model), torch.device("meta"):
        kind = find_class(config)
        if issubclass(kind, PreTrainedModel):
            module = kind(config).to(dtype)
        else:  # an auto class
            module = kind.from_config(config, dtype=dtype, trust_remote_code=trust.allows_code)
    made: PreTrainedModel = module.eval()
    if (count := sum(p.numel() for p in made.parameters())) > PARAMETERS:
        raise ModelError(f"{model} would have {count:.1e} parameters; check the numbers in its config.json", name=model)
    return made


def load_config(model: str, *, trust: Trust = NO_CODE) -> PreTrainedConfig:
    """The config of ``model`` (any spelling that :func:`load` takes), without its weights."""
    # If a file is not converted yet, what it says itself will do: converting it takes long.
    source = locate(model, weights=False)
    if source.is_file() and not _locate_converted(loader := choose_loader(source), source).is_dir():
        with explain_load_errors(model):
            return loader.read_config(source, trust)
    folder = _open_folder(source)
    with explain_load_errors(model):
        config = _read_config(folder, trust)
    check_sizes(model, config)
    return config


def load_tokenizer(model: str, *, trust: Trust = NO_CODE) -> PreTrainedTokenizerBase:
    """The tokenizer of ``model`` (any spelling that :func:`load` takes).

    Raises:
        MptkError: the checkpoint has none.
    """
    folder = _open_folder(locate(model, weights=False))
    if not has_tokenizer(folder):
        raise FileError(
            f"{model} has no tokenizer; copy the tokenizer files of the model it came from into {folder}", name=model
        )
    return _load_tokenizer(folder, model, trust)


def read_stored_config(loaded: Loaded) -> PreTrainedConfig:
    """The config in a loaded model's folder. The model's own config has the dtype of loading."""
    with explain_load_errors(loaded.source):
        return _read_config(loaded.path, loaded.trust)


def _read_config(folder: Path, trust: Trust) -> PreTrainedConfig:
    return choose_loader(folder).read_config(folder, trust)


def locate(model: str, *, weights: bool = True, local: bool = False) -> Path:
    """The file or folder of ``model`` on this machine.

    ``weights``: whether to download weights from a hub. ``local``: download nothing.
    """
    # In the order that ``load`` promises: a name that stands for a model, a file, a folder, the hub.
    if (naming := find_naming_loader(model)) is not None:
        if local and not naming.find_local_copy(model):
            raise make_absent_error(model)
        path = naming.fetch(model)
        if path.is_file() and find_file_loader(str(path)) is None:
            raise make_unread_error(str(path))
        return path
    path = check_model_name(model)
    if os.path.lexists(path):
        check_local_model(model, path)
        if path.is_dir():
            check_folder(path)
        return path
    # Nothing of this name is here, so it can only be a hub's.
    found = download_checkpoint(model, [*SMALL_FILES, "*.safetensors"] if weights else SMALL_FILES, local=local)
    check_folder(found)
    return found


def _open_folder(source: Path) -> Path:
    """The checkpoint folder of a file or folder. A file is converted to one."""
    return source if source.is_dir() else _convert(choose_loader(source), source)


def _convert(loader: Loader, source: Path) -> Path:
    """The checkpoint that a loader makes of a file or folder, from the cache if it is there."""
    place = _locate_converted(loader, source)

    def write(folder: Path) -> None:
        loader.convert(source, folder)
        # The place is named after the content that was there before. Another content must not get its name.
        if _locate_converted(loader, source) != place:
            raise ChangedError(f"{source} changed while it was converted; start again", name=source)

    return build_private(place, write)


def _locate_converted(loader: Loader, source: Path) -> Path:
    """The folder of the checkpoint that a loader makes of a file or folder."""
    # One for each content: a file that was changed under its name is converted again.
    files = [source] if source.is_file() else sorted(file for file in source.iterdir() if file.is_file())
    digests = [f"{file.name}|{read_sha256(file)}" for file in files]
    key = "|".join([str(source.resolve()), *digests, str(loader.conversion)])
    return locate_private_folder("checkpoints", f"{source.stem}-{hash_text(key, 12)}")


def load_pretrained(
    folder: Path, model: str, config: PreTrainedConfig, trust: Trust, **options: object
) -> PreTrainedModel:
    """The model in ``folder``, in evaluation mode, with every parameter from the checkpoint."""
    with explain_load_errors(model):
        module, report = find_class(config).from_pretrained(
            folder,
            config=config,
            trust_remote_code=trust.allows_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the file's name
            **options,
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        file = next((file for file in folder.glob("*.safetensors") if name in read_float_types(file)), folder)
        raise FileError(
            f"{name} in {file} is {list(found)}, and config.json makes it {list(wanted)}; one of both is of another "
            "model: download it again",
            name=name,
        )
    if missing := sorted(report["missing_keys"]):
        raise FileError(
            f"{model} has no weights for {len(missing)} parameters of {type(module).__name__} ({missing[0]}, ...), "
            "which would be random; give a checkpoint with them, or name its class in config.json's architectures",
            name=model,
        )
    loaded: PreTrainedModel = module.eval()
    return loaded


def _refuse_pickles(folder: Path, config: PreTrainedConfig) -> None:
    # transformers reads the weights from this file, whatever it is. It must not lead out of the folder.
    named = getattr(config, "transformers_weights", None)
    if named is not None and (not isinstance(named, str) or named != Path(named).name):
        raise FileError(
            f"config.json in {folder} names {named!r} for weights, which is no file of it; remove that name",
            name=folder,
        )
    # A pickle beside safetensors does no harm: transformers is told to read only these.
    if any(folder.glob("*.safetensors")) and (named is None or ".safetensors" in named):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    found = f"only {pickles[0]}, a pickle, which can run code" if pickles else "none at all"
    raise FileError(
        f"{folder} has no safetensors weights ({found}); if you trust it, convert it with transformers: "
        "AutoModel....from_pretrained(DIR).save_pretrained(NEW_DIR)",
        name=folder,
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder has files of a tokenizer."""
    return any(file.is_file() for pattern in _TOKENIZER_FILES for file in folder.glob(pattern))


def _load_tokenizer(folder: Path, model: str, trust: Trust) -> PreTrainedTokenizerBase:
    with explain_load_errors(model):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.allows_code)
        tokenizer("a")  # some damage shows at the first text
    return tokenizer


@contextmanager
def explain_load_errors(model: str) -> Iterator[None]:
    """Turn errors of transformers into MptkErrors of one line, for the model of that name."""
    try:
        yield
    except MptkError:
        raise
    except Exception as error:  # a config of any content meets code of any class: no error has a base class in common
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{model} needs Python code of its own, which would run on this machine; read it, and if you trust "
                "it pass --trust-remote-code (trust_remote_code=True)",
                name="trust_remote_code",
            ) from error
        raise ModelError(
            f"transformers cannot load {model}: {take_first_line(error)}; "
            f"check its files, and whether transformers {transformers.__version__} knows it",
            name=model,
        ) from error
