"""origin: digests of a run's inputs (model, tokenizer, data, plan), taken before the run begins.

A run takes hours, and reads its model and its data again and again. A file that changes meanwhile would give a result
that is of neither the old inputs nor the new ones, and the proof need not notice.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mptk.config import IN_MEMORY, Settings
from mptk.errors import ChangedError, MptkError
from mptk.files import expand_path, format_json
from mptk.io import Loaded, data, hash_loaded_weights, hash_model, list_model_files
from mptk.ir import Plan
from mptk.protocols.unfinished import name_differing
from mptk.publish.manifest import MARKER, compute_digests, hash_file

# Names of inputs as messages show them.
GIVEN_WEIGHTS, GIVEN_TOKENIZER = "the model's weights", "the tokenizer"
MODEL_FILE = "the model's "
ADDED = '"added_tokens"'
"""Where a fast tokenizer's JSON begins to define the ids."""


@dataclass(frozen=True)
class Origin:
    """``model``: the dense model's fingerprint, as in a report. ``parts``: input → its SHA-256."""

    model: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)

    def require(self, now: Origin) -> None:
        """Raise MptkError if the inputs ``now`` differ: the result would mix old and new."""
        if changed := name_differing(self.parts, now.parts):
            raise ChangedError(f"{changed} changed during the run, so nothing was published; start again", name=changed)


def compute_origin(source: str, loaded: Loaded, settings: Settings, start: Path | None, plan: Plan | None) -> Origin:
    """Digests of the inputs of a run on ``source``. ``start``: the folder whose weights it trains. ``plan``: as read.

    Digests of files are kept by the file system's data on them, so unchanged files are not read again.
    """
    model, parts = _hash_dense_parts(source, loaded)
    if settings.plan is not None and plan is not None:
        parts[settings.plan] = plan.digest
    # Of a pruned folder only the manifest is hashed: it has the digests of all other files.
    others = [
        settings.inputs,
        *(str(expand_path(each) / MARKER) for each in (start, settings.larger) if each is not None),
    ]
    with contextlib.suppress(OSError):  # a file that cannot be read is named where it is read
        parts |= data.hash_text_files(*list_sources(settings))
        parts |= {each: hash_file(expand_path(each)) for each in others if each is not None}
    return Origin(model, parts)


def _hash_dense_parts(source: str, loaded: Loaded) -> tuple[str, dict[str, str]]:
    """The dense model's fingerprint, and digests of its parts and of the tokenizer."""
    parts: dict[str, str] = {}
    if loaded.live:
        model = parts[GIVEN_WEIGHTS] = hash_loaded_weights(loaded)
    else:
        files = list_model_files(source, local=True)
        model, digests = hash_model(source, local=True), compute_digests(files.values())
        parts |= {MODEL_FILE + name: digest for name, digest in zip(files, digests, strict=True)}
    if loaded.tokenizer is not None:  # a caller may give one of his own
        parts[GIVEN_TOKENIZER] = _hash_tokenizer(loaded.tokenizer)
    return model, parts


def check_dense(source: str, loaded: Loaded, origin: Origin) -> None:
    """Raise MptkError if the dense model of a run, or its tokenizer, is no longer as the run found it.

    A pruned model that was not opened from its folder is computed anew from the dense weights.
    """
    _, now = _hash_dense_parts(source, loaded)
    if changed := name_differing({name: origin.parts.get(name) for name in now}, now):
        raise ChangedError(
            f"the dense {loaded.source} changed since it was pruned ({changed}); put it back, or save the pruned model "
            "and open its folder",
            name=changed,
        )


def check_given_tokenizer(loaded: Loaded, origin: Origin) -> None:
    """Raise MptkError if the tokenizer that a run was given is no longer as the run found it."""
    if loaded.tokenizer is not None and _hash_tokenizer(loaded.tokenizer) != origin.parts.get(GIVEN_TOKENIZER):
        raise ChangedError(
            f"{GIVEN_TOKENIZER} of the dense {loaded.source} changed since it was pruned; put it back, or save the "
            "pruned model and open its folder",
            name=GIVEN_TOKENIZER,
        )


def read_file_states(source: str) -> list[tuple[int, ...]]:
    """The file system's data on a model's files, to notice changes cheaply; empty if they are not on this machine."""
    try:
        files = list_model_files(source, local=True).values()
    except MptkError:
        return []
    states = [os.stat(file) for file in files]
    return [(state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for state in states]


def check_kept_samples(kept: Mapping[str, Tensor], now: Mapping[str, Tensor], where: Path) -> None:
    """Raise MptkError if the caller's samples differ from the ones of the unfinished run ``where``."""
    if not all(name in kept and torch.equal(kept[name], tensor) for name, tensor in now.items()):
        raise ChangedError(
            f"data in memory differs from the data that {where} was started with; give the same, or remove that folder",
            name="data",
        )


def list_sources(settings: Settings) -> Sequence[str]:
    """The named sources of samples and of texts."""
    return [source for source in settings.sources if source != IN_MEMORY]


def _hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the parts of a tokenizer that make the ids.

    Padding and truncation are left out: a call with either sets it in the tokenizer, and the ids stay the same.
    """
    known = [type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.chat_template]
    digest = hashlib.sha256(format_json(known, sort_keys=True).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        digest.update(format_json(tokenizer.get_vocab(), sort_keys=True).encode())
    else:  # its JSON begins with truncation and padding, up to ``ADDED``
        digest.update("".join(backend.to_str().partition(ADDED)[1:]).encode())
    return digest.hexdigest()
