"""dense: which dense model a folder was pruned from, by fingerprint, and loading it on nobody's word but the user's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mptk.errors import MptkError
from mptk.files import json_text
from mptk.io import models
from mptk.io.manifest import file_sha256
from mptk.io.packaged import ALIASES

_PARTS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "*.py")


def fingerprint(model: str, *, local: bool = False) -> str:
    """SHA-256 over what a dense model is: its config, weights and code; of a ``.gguf`` file, over that file.

    ``local``: nothing is brought from anywhere. Raises MptkError if the model is not found.
    """
    path = models.locate(model, local=local)
    files = [path] if path.is_file() else sorted({p for pattern in _PARTS for p in path.glob(pattern)})
    digests = {"" if path.is_file() else file.name: file_sha256(file) for file in files}
    return hashlib.sha256(json_text(digests, sort_keys=True).encode()).hexdigest()


def absolute(model: str) -> str:
    """A local model's absolute path; an alias or a hub's id as it is."""
    path = Path(model).expanduser()
    return str(path.resolve()) if model not in ALIASES and path.exists() else model


def load_dense(said: str, expected: str, model: str | None, trust: bool) -> models.Loaded:
    """The dense model of a pruned folder.

    Args:
        said: where the folder's report says that it is; ``expected``: its fingerprint.
        model: where the caller says that it is. Else it is where the report says, if that is on this machine: nothing
            is downloaded because a folder names it.
        trust: the caller's own word on the model's Python code; the report's is not asked.

    Raises:
        MptkError: it is not there; or what is there has another fingerprint, which is looked at before it is loaded.
    """
    source = model or said
    if fingerprint(source, local=model is None) != expected:
        raise MptkError(f"{source} is not the dense model that was pruned: its files differ; give that one as --model")
    return models.load(source, trust_remote_code=trust, local=model is None)
