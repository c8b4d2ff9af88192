"""models: load a transformers model from a hub id, a local folder, a GGUF file or a packaged alias.

All of these first become a plain checkpoint folder. A GGUF file or a quantised checkpoint is dequantised once, to a
safetensors checkpoint in the cache folder (``MPTK_CACHE``, else the platform's user cache). Only safetensors are read,
since a pickle can run code. A model's own Python code runs only if the caller trusts it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from gguf import GGUFReader
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mptk.arguments import guard_arguments
from mptk.compat.transformers import dequantize_gguf, read_gguf_config
from mptk.errors import MptkError, take_first_line
from mptk.files import expand_path, tidy
from mptk.io.auto_classes import find_loader
from mptk.io.cache import build_private, locate_private_folder, read_sha256
from mptk.io.checkpoint import (
    SMALL_FILES,
    fill_parameters,
    find_quantized_dtype,
    find_stored_dtype,
    read_float_types,
    save_checkpoint,
)
from mptk.io.diffusion import PIPELINE, is_diffusers, list_model_parts, read_config
from mptk.io.packaged import ALIASES, fetch, find_cached
from mptk.io.quantized import read_quantization, write_float
from mptk.io.resident import Resident
from mptk.io.tensors import Files
from mptk.io.untrusted import PARAMETERS, check_folder, check_gguf, check_sizes
from mptk.ir import Program, Weights
from mptk.plain import hash_text
from mptk.publish.licence import write_stub
from mptk.trust import NO_CODE, Trust, trust_by_caller

# In the names of converted checkpoints in the cache. Raise it if the same file is now converted differently.
_CONVERSION = 3
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.tiktoken", "*.model")
# Files to download from a hub: no subfolders, no second copy in another format.
_HUB_IGNORED = ("*/*", "consolidated*")


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

    ``model`` is, in this order: a packaged alias (``packaged.ALIASES``; write ``./NAME`` for a folder of that name), a
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
    folder = _locate_checkpoint(model, local=local)
    with _explain_errors(model):
        config = _read_config(folder, trust)
    # Before any weight is read: refuse what cannot be a model, and weights that could run code.
    check_sizes(model, config)
    _refuse_pickles(folder, config)
    # Quantised weights become a float checkpoint in the cache, which is loaded in their place.
    settings, note = read_quantization(folder), ""
    if settings is not None:
        method = settings["quant_method"]
        note = f"{model} is quantised ({method}): its weights were read as floats, and the result has float weights"
        folder = build_private(_locate_converted(folder), partial(write_float, folder, settings))
        with _explain_errors(model):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust.allows_code)
    elif (found := find_quantized_dtype(folder)) is not None:
        raise MptkError(
            f"{model} has weights of type {found}, and its config.json has no quantization_config; give the float "
            "checkpoint"
        )
    module = _from_pretrained(folder, model, config=config, trust_remote_code=trust.allows_code, **options)
    tokenizer = _load_tokenizer(folder, model, trust) if has_tokenizer(folder) else None
    return Loaded(module, tokenizer, model, folder, trust, find_stored_dtype(folder), note=note)


def build_skeleton(model: str, *, dtype: torch.dtype = torch.float32, trust: Trust = NO_CODE) -> PreTrainedModel:
    """The model of :func:`load` on the meta device, without weights.

    It needs only the config, or the metadata of a GGUF file that has not been converted yet.
    """
    config = load_config(model, trust=trust)
    # A config may ask for weights of any size; on the meta device they take no memory.
    with _explain_errors(model), torch.device("meta"):
        kind = find_loader(config)
        if issubclass(kind, PreTrainedModel):
            module = kind(config).to(dtype)
        else:  # an auto class
            module = kind.from_config(config, dtype=dtype, trust_remote_code=trust.allows_code)
    made: PreTrainedModel = module.eval()
    if (count := sum(p.numel() for p in made.parameters())) > PARAMETERS:
        raise MptkError(f"{model} would have {count:.1e} parameters; check the numbers in its config.json")
    return made


def load_config(model: str, *, trust: Trust = NO_CODE) -> PreTrainedConfig:
    """The config of ``model`` (any spelling that :func:`load` takes), without its weights."""
    # If a GGUF file is not converted yet, its metadata will do: converting it takes long.
    gguf = _locate_gguf(model)
    if gguf is not None and not _locate_converted(gguf).is_dir():
        with _explain_errors(model):
            return read_gguf_config(gguf)
    folder = _locate_checkpoint(model, weights=False)
    with _explain_errors(model):
        config = _read_config(folder, trust)
    check_sizes(model, config)
    return config


def load_tokenizer(model: str, *, trust: Trust = NO_CODE) -> PreTrainedTokenizerBase:
    """The tokenizer of ``model`` (any spelling that :func:`load` takes).

    Raises:
        MptkError: the checkpoint has none.
    """
    folder = _locate_checkpoint(model, weights=False)
    if not has_tokenizer(folder):
        raise MptkError(f"{model} has no tokenizer; copy the tokenizer files of the model it came from into {folder}")
    return _load_tokenizer(folder, model, trust)


def read_stored_config(loaded: Loaded) -> PreTrainedConfig:
    """The config in a loaded model's folder. The model's own config has the dtype of loading."""
    with _explain_errors(loaded.source):
        return _read_config(loaded.path, loaded.trust)


def _read_config(folder: Path, trust: Trust) -> PreTrainedConfig:
    if is_diffusers(folder):
        return read_config(folder)
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust.allows_code)
    return config


def locate(model: str, *, local: bool = False) -> Path:
    """The ``.gguf`` file or the folder of ``model``. ``local``: download nothing."""
    return _locate_gguf(model, local=local) or _locate_checkpoint(model, local=local)


def _locate_checkpoint(model: str, *, weights: bool = True, local: bool = False) -> Path:
    """The local folder of ``model``. ``weights``: whether to download weights from a hub."""
    # In the order that ``load`` promises: an alias, a GGUF file, a folder, the hub.
    if model in ALIASES and ALIASES[model].folder:
        return _fetch_alias(model, local)
    gguf = _locate_gguf(model, local=local)
    if gguf is not None:
        return build_private(place := _locate_converted(gguf), lambda folder: _convert(gguf, folder, place))
    path = _parse_path(model)
    tidy(path.parent)  # a killed process may have left this folder renamed aside
    if path.is_dir():
        if not os.path.lexists(path / "config.json") or (path / "config.json").is_dir():
            # A pipeline of diffusers has a config in the folder of each part.
            if (path / PIPELINE).is_file():
                named = ", ".join(f"{model}/{part}" for part in list_model_parts(path))
                raise MptkError(f"{model} is a whole pipeline; give one of its parts: {named}")
            raise MptkError(f"{model} has no config.json; give a transformers checkpoint folder or a .gguf file")
        check_folder(path)
        return path
    if os.path.lexists(path):
        raise MptkError(f"{model} is neither a checkpoint folder nor a .gguf file; give one of these")
    # Nothing of this name is here, so it can only be a hub's.
    try:
        found = Path(
            snapshot_download(
                model,
                allow_patterns=[*SMALL_FILES, "*.safetensors"] if weights else [*SMALL_FILES],
                ignore_patterns=[*_HUB_IGNORED],
                local_files_only=local,
            )
        )
        check_folder(found)
        return found
    except (OSError, ValueError) as error:
        if local:
            raise _make_absent_error(model) from error
        raise MptkError(
            f"{model!r} is no packaged alias ({', '.join(sorted(ALIASES))}), .gguf file or local folder, and the hub "
            f"does not provide it: {take_first_line(error)}; check the name, the network and, if it is gated, HF_TOKEN"
        ) from error


def _parse_path(model: str) -> Path:
    """A model's name as a path. Raises MptkError if it cannot be one."""
    # Whether it is one, only the system knows: ask whether it exists.
    try:
        path = expand_path(model)
        path.exists()
    except (OSError, ValueError) as error:  # too long; a null character
        raise MptkError(
            f"{model!r} cannot be a model's name: {error}; give a folder, a file, an alias or a hub id"
        ) from error
    if not model or "\0" in model:
        raise MptkError(f"{model!r} cannot be a model's name; give a folder, a file, an alias or a hub id")
    return path


def _make_absent_error(model: str) -> MptkError:
    return MptkError(f"{model} is not on this machine, and a report may not start a download; give --model")


def _fetch_alias(alias: str, local: bool) -> Path:
    """A packaged model's file or folder, downloaded if necessary and not ``local``."""
    if local and not find_cached(alias):
        raise _make_absent_error(alias)
    return fetch(alias)


def _locate_gguf(model: str, *, local: bool = False) -> Path | None:
    """The GGUF file of ``model``, downloaded if necessary; None if ``model`` is not one."""
    if model in ALIASES:
        return None if ALIASES[model].folder else _fetch_alias(model, local)
    if not model.lower().endswith(".gguf"):
        return None
    path = _parse_path(model)
    if not path.is_file():
        raise MptkError(f"there is no file {model}; check the path")
    check_gguf(path)
    return path


def _locate_converted(source: Path) -> Path:
    """The folder of the checkpoint that a GGUF file or a quantised checkpoint becomes."""
    # One for each content: a file that was changed under its name is converted again.
    files = [source] if source.is_file() else sorted(file for file in source.iterdir() if file.is_file())
    digests = [f"{file.name}|{read_sha256(file)}" for file in files]
    key = "|".join([str(source.resolve()), *digests, str(_CONVERSION)])
    return locate_private_folder("checkpoints", f"{source.stem}-{hash_text(key, 12)}")


def _convert(gguf: Path, folder: Path, place: Path) -> None:
    """Dequantise ``gguf`` to float32 and save it in ``folder`` as a checkpoint, whose place will be ``place``."""
    with _explain_errors(str(gguf)):
        config = read_gguf_config(gguf)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, config=config)
    options = {"gguf_file": gguf.name, **dequantize_gguf()}
    module = _from_pretrained(gguf.parent, str(gguf), config=config, dtype=torch.float32, **options)
    # A tokenizer that is read from GGUF knows no longest text, so it gets the model's.
    if isinstance(length := getattr(config, "max_position_embeddings", None), int):
        tokenizer.model_max_length = length
    save_checkpoint(module, tokenizer, folder)
    if said := _read_gguf_licence(gguf):
        write_stub(folder, said)
    # The place is named after the content that was there before. Another content must not get its name.
    if _locate_converted(gguf) != place:
        raise MptkError(f"{gguf} changed while it was converted; start again")


def _read_gguf_licence(gguf: Path) -> str:
    """The licence in a GGUF file's metadata; empty if it names none."""
    with _explain_errors(str(gguf)):
        field = GGUFReader(gguf).get_field("general.license")
        return "" if field is None else str(field.contents())


def _from_pretrained(folder: Path, model: str, *, config: PreTrainedConfig, **options: object) -> PreTrainedModel:
    """The model in ``folder``, in evaluation mode, with every parameter from the checkpoint."""
    with _explain_errors(model):
        module, report = find_loader(config).from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the file's name
            **options,
        )
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        file = next((file for file in folder.glob("*.safetensors") if name in read_float_types(file)), folder)
        raise MptkError(
            f"{name} in {file} is {list(found)}, and config.json makes it {list(wanted)}; one of both is of another "
            "model: download it again"
        )
    if missing := sorted(report["missing_keys"]):
        raise MptkError(
            f"{model} has no weights for {len(missing)} parameters of {type(module).__name__} ({missing[0]}, ...), "
            "which would be random; give a checkpoint with them, or name its class in config.json's architectures"
        )
    loaded: PreTrainedModel = module.eval()
    return loaded


def _refuse_pickles(folder: Path, config: PreTrainedConfig) -> None:
    # transformers reads the weights from this file, whatever it is. It must not lead out of the folder.
    named = getattr(config, "transformers_weights", None)
    if named is not None and (not isinstance(named, str) or named != Path(named).name):
        raise MptkError(
            f"config.json in {folder} names {named!r} for weights, which is no file of it; remove that name"
        )
    # A pickle beside safetensors does no harm: transformers is told to read only these.
    if any(folder.glob("*.safetensors")) and (named is None or ".safetensors" in named):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    found = f"only {pickles[0]}, a pickle, which can run code" if pickles else "none at all"
    raise MptkError(
        f"{folder} has no safetensors weights ({found}); if you trust it, convert it with transformers: "
        "AutoModel....from_pretrained(DIR).save_pretrained(NEW_DIR)"
    )


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder has files of a tokenizer."""
    return any(file.is_file() for pattern in _TOKENIZER_FILES for file in folder.glob(pattern))


def _load_tokenizer(folder: Path, model: str, trust: Trust) -> PreTrainedTokenizerBase:
    with _explain_errors(model):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.allows_code)
        tokenizer("a")  # some damage shows at the first text
    return tokenizer


@contextmanager
def _explain_errors(model: str) -> Iterator[None]:
    """Turn errors of transformers into MptkErrors of one line."""
    try:
        yield
    except MptkError:
        raise
    except Exception as error:  # a config of any content meets code of any class: no error has a base class in common
        if "trust_remote_code" in str(error):
            raise MptkError(
                f"{model} needs Python code of its own, which would run on this machine; read it, and if you trust "
                "it pass --trust-remote-code (trust_remote_code=True)"
            ) from error
        raise MptkError(
            f"transformers cannot load {model}: {take_first_line(error)}; "
            f"check its files, and whether transformers {transformers.__version__} knows it"
        ) from error
