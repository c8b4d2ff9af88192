"""emit: write the cut weights as a checkpoint folder that stock transformers loads without mptk."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mptk.compat.transformers import replace_saver
from mptk.errors import TargetError
from mptk.files import format_json
from mptk.io import defer_weight, make_portable_config, make_writer, plan_shards, save_tokenizer
from mptk.ir import Weights
from passes.targets.stock.attempt import list_weight_shapes
from passes.targets.stock.config import StockConfig

NONE = Weights({})


def write_checkpoint(
    state: Mapping[str, Tensor],
    stock: StockConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    *,
    portable: Callable[[Mapping[str, object]], dict[str, object]] = make_portable_config,
    max_shard_size: int | str = "5GB",
    beside: Weights = NONE,
    save: Callable[[Weights], Callable[..., None]] = make_writer,
) -> None:
    """Write config, generation config, weights (safetensors) and tokenizer into the existing ``folder``.

    Args:
        state: state-dict name → tensor after the cut, tied names included. If they are ``Weights``, lazy ones are made
            when they are written, one at a time.
        stock: the class and config to write.
        model: the model before the cut; its generation config is copied.
        tokenizer: saved with the model; None if there is none.
        portable: last change to the content of config.json. The default adds the spellings of older releases.
        max_shard_size: largest weights file. A larger model gets several files and an index.
        beside: further weights, which the stock class does not hold. The forms that it splits when it is saved (the
            experts of a layer) are split in them, too.
        save: makes, of all weights, the function that writes a file of them.

    Raises:
        MptkError: ``state`` has other names or shapes than the stock class, or its tied weights differ.
    """
    # Refuse first: the stock class, without memory for weights, must have the cut model's names and shapes.
    weights = Weights(state)
    likes = weights.likes
    dtype = next((like.dtype for like in likes.values() if like.is_floating_point()), torch.float32)
    shell = _build_shell(stock, dtype)
    _check_shapes(likes, list_weight_shapes(shell))
    _check_tied(shell, weights)
    if shell.can_generate() and getattr(model, "generation_config", None) is not None:
        shell.generation_config = copy.deepcopy(model.generation_config)
    # ``save_pretrained`` writes only weights that the model has.
    for name in beside:
        _attach(shell, name, beside.find_like(name))
    weights = weights.with_entries(beside)
    # It gets placeholders, which it splits and renames in its own way. The writer makes each real tensor when it writes
    # it, so that one is in memory at a time.
    later = {name: defer_weight(name, weights.find_like(name)) for name in shell.state_dict()}
    with replace_saver(plan_shards, save(weights)):
        shell.save_pretrained(folder, state_dict=later, max_shard_size=max_shard_size)
    # transformers wrote this file: it is written again with the spellings of older releases, and as all JSON here.
    path = folder / "config.json"
    written = portable(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(format_json(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)


def _build_shell(stock: StockConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The stock model on the meta device, in ``dtype``, unquantised."""
    # The weights are plain floats, whatever the dense checkpoint stored.
    config = copy.deepcopy(stock.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        shell = stock.model_class(config)
    nn.Module.to(shell, dtype)
    shell.tie_weights()
    return shell


def _attach(shell: nn.Module, name: str, like: Tensor) -> None:
    """Give ``shell`` a parameter of that name, which no code uses."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in dict(shell.named_children()):
            shell.add_module(part, nn.Module())
        shell = shell.get_submodule(part)
    shell.register_parameter(leaf, nn.Parameter(torch.empty_like(like, device="meta"), requires_grad=False))


def _check_shapes(likes: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(likes.keys() ^ shapes.keys()):
        owner = "cut model" if name in likes else "stock class"
        raise TargetError(f"only the {owner} has the weight {name}; the stock config does not fit the cut", name=name)
    for name, like in likes.items():
        if tuple(like.shape) != shapes[name]:
            raise TargetError(
                f"{name} is {tuple(like.shape)} after the cut but {shapes[name]} in the stock class; "
                "the stock config does not fit the cut",
                name=name,
            )


def _check_tied(shell: PreTrainedModel, weights: Weights) -> None:
    """Check that weights tied in the stock class are equal: the checkpoint holds only one of them."""
    first: dict[int, str] = {}
    for name, parameter in shell.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if other == name or weights.get_entry(name) is weights.get_entry(other):  # nothing to read
            continue
        if not torch.equal(weights[name], weights[other]):
            raise TargetError(
                f"{name} and {other} are one weight in the stock class but differ; untie them in the config", name=name
            )
