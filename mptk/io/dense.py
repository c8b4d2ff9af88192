"""dense: identify a pruned folder's dense model by its fingerprint, and open it.

Only the user's own word allows a download, or the model's Python code. The folder's report does not.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mptk.errors import FileError, InputError, MptkError
from mptk.files import expand_path, format_json
from mptk.io import models
from mptk.io.live import hash_loaded_weights, open_live
from mptk.io.loaders import find_naming_loader
from mptk.io.resident import Resident
from mptk.plain import hash_text
from mptk.publish.manifest import compute_digests
from mptk.trust import Trust

# Files that make the fingerprint: what a model computes depends on them.
_PARTS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py")
# Files that make a model's inputs. A run reads them, but they are not part of the fingerprint.
_READERS = (
    *("tokenizer*", "vocab*", "merges.txt", "*.tiktoken", "*.model", "*.jinja", "special_tokens_map.json"),
    *("added_tokens.json", "*processor_config.json"),
)


def list_model_files(model: str, *, local: bool = False) -> dict[str, Path]:
    """Name → path of the files that a run reads of a dense model, with its tokenizer's files.

    ``local``: download nothing. Raises MptkError if the model is not found.
    """
    path = models.locate(model, local=local)
    if path.is_file():
        return {path.name: path}
    found = {each for pattern in (*_PARTS, *_READERS) for each in path.glob(pattern) if each.is_file()}
    return {each.name: each for each in sorted(found)}


def hash_model(model: str, *, local: bool = False) -> str:
    """The fingerprint of a dense model: a SHA-256 of its config, weights and code, or of its ``.gguf`` file.

    ``local``: download nothing. Raises MptkError if the model is not found.
    """
    path = models.locate(model, local=local)
    files = [path] if path.is_file() else sorted({p for pattern in _PARTS for p in path.glob(pattern)})
    names = ["" if path.is_file() else file.name for file in files]  # a GGUF file may be renamed
    digests = dict(zip(names, compute_digests(files), strict=True))
    return hash_text(format_json(digests, sort_keys=True))


def resolve_model_name(model: str) -> str:
    """A local model's absolute path; a loader's name or a hub id unchanged."""
    path = expand_path(model)
    return str(path.resolve()) if find_naming_loader(model) is None and path.exists() else model


def open_dense(
    said: str,
    expected: str,
    model: str | nn.Module | None,
    trust: Trust,
    resident: Resident,
    *,
    live: bool = False,
) -> models.Loaded:
    """The dense model of a pruned folder, as ``models.open_weights`` or ``open_live`` gives it.

    Args:
        said: the model's name in the folder's report.
        expected: its fingerprint.
        model: the caller's name for it, or itself. If None, the report's name is used and nothing is downloaded.
        trust: whether the caller lets the model's Python code run. The report has no say in this.
        resident: keeps weights that were read.
        live: it was in memory when it was pruned, so that the fingerprint covers only its weights.

    Raises:
        MptkError: the model is not found, or has another fingerprint. This is checked before it is loaded.
    """
    if isinstance(model, nn.Module) or live:
        return _open_same_weights(said, expected, model, trust, resident, live)
    source = model or said
    if hash_model(source, local=model is None) != expected:
        raise InputError(
            f"{source} is not the dense model that was pruned: its files differ; give that one as --model", name="model"
        )
    return models.open_weights(source, resident, trust=trust, local=model is None)


def _open_same_weights(
    said: str, expected: str, model: str | nn.Module | None, trust: Trust, resident: Resident, live: bool
) -> models.Loaded:
    """The dense model, if it has the weights that were pruned."""
    # The fingerprint of files cannot be compared with weights in memory. The other way round works: files are opened.
    if not live:
        raise InputError(
            "this folder was pruned from files; give the name of that model, and not a model in memory", name="model"
        )
    if isinstance(model, nn.Module):
        loaded = open_live(model, trust=trust)
    else:
        try:
            loaded = models.open_weights(model or said, resident, trust=trust, local=model is None)
        except MptkError as error:
            if model is not None:
                raise
            # ``said`` names what the model in memory came from. It may be gone by now, or never have been a folder.
            raise FileError(
                f"the dense {said} was pruned in memory and is not on this disk; save it with save_pretrained(DIR) and "
                "give --model DIR, or give the model itself to mptk.verify",
                name=said,
            ) from error
    if hash_loaded_weights(loaded) != expected:
        raise InputError(
            f"{loaded.source} is not the dense model that was pruned: its weights differ; save that one with "
            "save_pretrained(DIR) and give --model DIR",
            name="model",
        )
    return loaded
