"""narrow: a model with the rows of some tokens alone, opened as ``io/models.py`` opens one of a folder."""

from __future__ import annotations

import copy
import shutil
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from accelerate import init_empty_weights
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from mptk.errors import MptkError
from mptk.files import scratch
from mptk.io import models
from mptk.io.checkpoint import copy_processors, save_tokenizer
from mptk.io.licence import copy_card
from mptk.io.models import Loaded
from mptk.io.vocabulary.ids import renumbered
from mptk.io.vocabulary.tokens import trimmed_tokenizer
from mptk.ir.weights import Weights


def narrowed(loaded: Loaded, weights: Weights, kept: Sequence[int], rows: int) -> tuple[Loaded, dict[str, list[Any]]]:
    """The model with ``weights``, which have rows of the tokens ``kept`` of ``rows`` alone, and its config's changes.

    Its folder is a temporary one. It holds what a run reads of a checkpoint beside the weights.

    Raises:
        MptkError: the class has other weights for so many tokens; or the tokenizer cannot be trimmed.
    """
    new = {old: i for i, old in enumerate(kept)}
    config, changes = renumbered(loaded.model.config, new, rows)
    model = _built(loaded.model, config, weights)
    place = scratch()
    weakref.finalize(model, place.close)
    stored, _ = renumbered(models.config_in(loaded), new, rows)
    stored.save_pretrained(place.folder)
    copy_processors(loaded.path, place.folder, same_features=True)
    copy_card(loaded.path, place.folder)
    for file in loaded.path.glob("*.py"):
        shutil.copyfile(file, place.folder / file.name)
    if (generation := getattr(loaded.model, "generation_config", None)) is not None:
        model.generation_config, more = renumbered(generation, new, rows)
        model.generation_config.save_pretrained(place.folder)
        changes = {**more, **changes}
    tokenizer = loaded.tokenizer
    if tokenizer is not None:
        tokenizer = trimmed_tokenizer(tokenizer, kept)
        save_tokenizer(tokenizer, place.folder)
    return replace(loaded, model=model, tokenizer=tokenizer, path=place.folder, weights=weights), changes


def _built(dense: PreTrainedModel, config: PreTrainedConfig, weights: Weights) -> PreTrainedModel:
    """The class of ``dense`` from another config, with parameters on the meta device and the buffers of ``dense``."""
    name = type(dense).__name__
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = type(dense)(copy.deepcopy(config)).eval()
        model.tie_weights()
    except Exception as error:  # a model class may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise MptkError(
            f"{name} cannot have {config.get_text_config().vocab_size} tokens ({reason}); leave out --vocabulary"
        ) from error
    there = {n: tuple(tensor.shape) for n, tensor in model.state_dict(keep_vars=True).items()}
    cut = {n: tuple(tensor.shape) for n, tensor in weights.likes.items()}
    if wrong := sorted(n for n in there.keys() | cut.keys() if there.get(n) != cut.get(n)):
        raise MptkError(
            f"{name} has a vocabulary that mptk cannot trim: with fewer tokens {wrong[0]} would be "
            f"{_said(there, wrong[0])}, and its rows that stay are {_said(cut, wrong[0])}; leave out --vocabulary"
        )
    before = dict(dense.named_buffers())
    for n, buffer in model.named_buffers():
        value = weights[n] if n in weights else before.get(n)
        if value is not None and value.shape == buffer.shape:
            buffer.copy_(value)
    return model


def _said(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"
