"""checkpoint: write a transformers checkpoint folder that other releases of transformers read the same way.

transformers 5 renamed fields: the rotary base moved from ``rope_theta`` into ``rope_parameters``, and a tokenizer's
class became ``TokenizersBackend``. Transformers 4 silently ignores the first, and then computes with its default base.
It refuses the second. So both spellings are written.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mptk.files import format_json
from mptk.io.text.tokens import find_begin_tokens
from mptk.publish.licence import CARD, NOTICES, copy_card

# The spellings of transformers 4 for an entry of `rope_parameters`. A config class reads the one that it knows, and
# ignores the other.
_PARTIAL_ROPE = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
_PLAIN_ROPE = {"rope_theta": ("rope_theta",)}
# The rotary types of transformers 4. It has no spelling for others, and classes that use them misread one.
_OLD_ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# How the tokenizer was loaded concerns this machine only.
_LOADING_STATE = ("is_local", "local_files_only")

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", CARD, *NOTICES)
"""What is read of a checkpoint folder beside weights. None of these patterns matches a pickle."""

# What prepares images, sound and videos; and what sentence-transformers reads to pool features.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_POOLING = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "*_Pooling/config.json")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write the tokenizer with its chat template, as transformers 4 and transformers.js read it, too."""
    tokenizer.save_pretrained(folder)
    path = Path(folder) / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in _LOADING_STATE:
        settings.pop(key, None)
    # transformers 4 refuses the new class name, and has another default for the inputs' names.
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.setdefault("model_input_names", tokenizer.model_input_names)
    # What the tokenizer puts before a text is in ``tokenizer.json``. The pipelines of transformers.js drop it without
    # this field, which transformers 5 no longer writes.
    if find_begin_tokens(tokenizer):
        settings["add_bos_token"] = True
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    # transformers reads the template from ``chat_template.jinja``, transformers.js from this file.
    if isinstance(template := tokenizer.chat_template, dict):
        template = [{"name": name, "template": each} for name, each in template.items()]
    if template:
        settings["chat_template"] = template
    _write_json(path, settings)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: str | Path) -> None:
    """Write safetensors, ``config.json``, ``generation_config.json`` and the tokenizer's files into ``folder``.

    The folder is made if missing. Stock ``from_pretrained`` loads it, also in transformers 4 if that has the
    architecture.
    """
    model.save_pretrained(folder)
    config = Path(folder) / "config.json"
    _write_json(config, make_portable_config(json.loads(config.read_text(encoding="utf-8"))))
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)


def copy_processors(source: Path, folder: Path, *, same_features: bool) -> None:
    """Copy what prepares images and sound for a model, and what pools its features, as they are.

    ``same_features``: whether its features have as many channels as before; a pooling layer's file names the number.
    """
    patterns = (*_PROCESSORS, *(_POOLING if same_features else ()))
    for path in sorted({path for pattern in patterns for path in source.glob(pattern)}):
        target = folder / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what a run reads of a checkpoint beside config, tokenizer and weights: processors, card, notices, code."""
    copy_processors(source, folder, same_features=True)
    copy_card(source, folder)
    for file in source.glob("*.py"):
        shutil.copyfile(file, folder / file.name)


def make_portable_config(config: Mapping[str, object]) -> dict[str, object]:
    """The content of a ``config.json``, with its rotary settings also in the spelling of transformers 4.

    The fields are added at the top level, beside ``rope_parameters``. The result loads as the same config. Nested
    configs (the text model's in a vision-language model's) are treated the same way.
    """
    written = {
        key: make_portable_config(value) if key.endswith("_config") and isinstance(value, Mapping) else value
        for key, value in config.items()
    }
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return written
    # Models with two kinds of attention (Gemma 3) have an entry for each.
    main, sliding = rope.get("full_attention", rope), rope.get("sliding_attention")
    if not isinstance(main, Mapping) or main.get("rope_type", "default") not in _OLD_ROPES:
        return written
    # Only classes that rotate a part of the head have the older names. All others know ``rope_theta``.
    names = _PARTIAL_ROPE if "partial_rotary_factor" in main else _PLAIN_ROPE
    legacy = {name: main[key] for key, spellings in names.items() if key in main for name in spellings}
    if main.get("rope_type", "default") != "default":
        legacy["rope_scaling"] = {key: value for key, value in main.items() if key not in names}
    if isinstance(sliding, Mapping) and "rope_theta" in sliding:
        legacy["rope_local_base_freq"] = sliding["rope_theta"]
    return written | legacy


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(format_json(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- the types of stored numbers, as safetensors names them ----

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTIZED = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8"}


def count_stored_dtypes(folder: Path) -> Counter[str]:
    """Type of the numbers in a folder's safetensors → how many there are of it."""
    found: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                part = weights.get_slice(name)
                found[part.get_dtype()] += math.prod(part.get_shape())
    return found


def read_float_types(file: Path) -> dict[str, torch.dtype | None]:
    """Name → floating type of each tensor in a safetensors file; None if its numbers are not of these types."""
    with safe_open(file, "pt") as weights:
        return {name: _FLOATS.get(weights.get_slice(name).get_dtype()) for name in weights.keys()}  # noqa: SIM118


def find_stored_dtype(folder: Path) -> torch.dtype:
    """The floating type of most numbers in a folder's safetensors. float32 without such numbers."""
    counts = {name: count for name, count in count_stored_dtypes(folder).items() if name in _FLOATS}
    return _FLOATS[max(counts, key=lambda name: counts[name])] if counts else torch.float32


def find_quantized_dtype(folder: Path) -> str | None:
    """The type of quantised weights, if most numbers in a folder's safetensors are quantised."""
    counts = count_stored_dtypes(folder)
    most = max(counts, key=lambda name: counts[name], default="")
    return most if most in _QUANTIZED else None


def fill_parameters(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the parameters of ``model`` that are on the meta device their values."""
    # By object: tied names are one parameter, whose numbers may be stored under any of them.
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        old = model.get_parameter(tied[0])
        value = next(weights[name] for name in tied if name in weights)
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        for name in tied:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, new)
