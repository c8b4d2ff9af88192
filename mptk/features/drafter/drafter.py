"""drafter: a model together with its multi-token-prediction layers, which its checkpoint has and its class leaves out.

Such a layer predicts one token more than the model: from the embedding of the next token and the model's last hidden
states, a decoder layer of the model's own class makes the next hidden states (DeepSeek-AI 2024, arXiv 2412.19437,
section 2.2). transformers runs the layers to draft tokens (``generate(use_mtp=True)``), and so do serving engines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpModel

from mptk.compat.transformers import list_ignored_weights
from mptk.errors import ModelError, take_first_line
from mptk.io.models import Loaded, fill_program
from mptk.io.resident import Resident, open_stored_weight
from mptk.io.tensors import Deferred, Files, find_own_weight, list_weight_names, read_likes
from mptk.ir import Program, Weights

# The module of a drafter that holds the layers.
MTP_HEADS = "mtp"
# Starts the names of a decoder layer's weights in a drafter.
MTP_BLOCK = re.compile(rf"{MTP_HEADS}\.layers\.\d+\.mtp_block\.")
# The number of a layer in the names of a checkpoint that counts these layers apart from the model's.
_NUMBERED = re.compile(r"(?:.*\.)?mtp\.layers\.(\d+)\.")
# Checkpoints may hold the model's tables twice: end of a copy's name → the method that gives the table's module.
_SHARED_TABLES = {"embed_tokens.weight": "get_input_embeddings", "shared_head.head.weight": "get_output_embeddings"}


class Drafter(nn.Module):
    """``forward(input_ids)``: logits of the model, then of each layer, float [1 + layers, batch, length, vocabulary].

    The names of the model's weights are the model's own.
    """

    def __init__(self, model: PreTrainedModel, heads: MtpModel) -> None:
        super().__init__()
        # The model's children, not the model, so that its weights keep their names.
        for name, child in model.named_children():
            self.add_module(name, child)
        # In a tuple they are no children: their weights have the model's names already.
        self._shared = (model, heads.embed_tokens, heads.shared_head)
        del heads.embed_tokens, heads.shared_head
        self.mtp = heads

    def forward(self, input_ids: Tensor) -> Tensor:
        model, embed, head = self._shared
        hidden = model.get_decoder()(input_ids, use_cache=False).last_hidden_state
        logits = [head(hidden)]
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        # Layer k predicts token t + 2 + k from the states at t and the embedding of token t + 1 + k. The first tokens
        # come in again at the end, so that all logits have one length.
        for layer in range(self.mtp.num_mtp_layers):
            input_ids = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)
            hidden = self.mtp.forward_layer(layer, hidden, positions, None, inputs_embeds=embed(input_ids))
            logits.append(head(hidden))
        return torch.stack(logits)


@dataclass(frozen=True)
class OpenDrafter:
    """A drafter whose weights are read when they are asked for.

    ``weights``: the layers' weights, by their names in ``module``. ``names``: name in ``module`` → name in the
    checkpoint; for what the class joins (the experts of a layer), the name that the joined weight would have there.
    ``copies``: tables of the model that the checkpoint has twice; ``tables``: their names → the names in ``module``.
    """

    module: Drafter
    weights: Weights
    names: Mapping[str, str]
    tables: Mapping[str, str]
    copies: Weights

    def with_weights(self, program: Program, model: Weights) -> Program:
        """``program``, which was traced from ``module``, with the weights of the model and of the layers."""
        return fill_program(program, self.module, model.with_entries(self.weights))


def find_stored_heads(model: PreTrainedModel, folder: Path) -> set[str]:
    """The names of the tensors of multi-token-prediction layers in a checkpoint folder; empty if there are none."""
    # A class that leaves no layers out has none of these: no file need be read.
    if not any("layers" in each or MTP_HEADS in each for each in list_ignored_weights(model)):
        return set()
    names = {name for file in folder.glob("*.safetensors") for name in read_likes(file)}
    try:
        found = MtpModel.get_mtp_weights_regex(model)
    except ValueError:  # transformers found no pattern for such layers among the ignored ones
        return set()
    return {name for name in names if found.search(name)}


def open_drafter(loaded: Loaded, folder: Path, resident: Resident) -> OpenDrafter | None:
    """The model with the multi-token-prediction layers of ``folder``; None if there are none.

    Raises:
        MptkError: transformers cannot make them of the checkpoint, or a table of theirs is not the model's.
    """
    stored = find_stored_heads(loaded.model, folder)
    if not stored:
        return None
    # transformers makes the layers, with deferred weights.
    files = Files()
    try:
        with files.defer_reads(), _set_checkpoint(loaded.model, folder, stored):
            heads = MtpModel.from_pretrained(loaded.model)
    except (RuntimeError, ValueError, AttributeError, KeyError, StopIteration) as error:
        raise ModelError(f"transformers cannot read them: {take_first_line(error)}") from error
    # The layers' own weights, without the tables that they share with the model.
    own = {n: t for n, t in heads.state_dict(keep_vars=True).items() if n.startswith("layers.")}
    names = _map_names({f"{MTP_HEADS}.{name}": tensor for name, tensor in own.items() if isinstance(tensor, Deferred)})
    weights = files.open_weights(heads, resident)
    module = Drafter(loaded.model, heads.eval()).eval()
    tables = _find_tables(loaded.model, stored)
    # Each stored tensor must have its use, or the result would lack it.
    if left := stored - {source for t in own.values() for source in list_weight_names(t)} - tables.keys():
        raise ModelError(f"transformers does not know what {min(left)} is for", name=min(left))
    copies = {name: open_stored_weight(files[name][0], name, files[name][1], resident) for name in tables}
    own_weights = Weights({f"{MTP_HEADS}.{name}": weights.get_entry(name) for name in own})
    return OpenDrafter(module, own_weights, names, tables, Weights(copies))


def _map_names(tensors: Mapping[str, Deferred]) -> dict[str, str]:
    """Name in a drafter → name in the checkpoint."""
    # Weights that are stored as they are show how the checkpoint names each layer. Joined weights get a name by that.
    found = {name: source for name, tensor in tensors.items() if (source := find_own_weight(tensor)) is not None}
    starts = {}
    for name, source in found.items():
        if (block := MTP_BLOCK.match(name)) and source.endswith(rest := name[block.end() :]):
            starts[block.group()] = source.removesuffix(rest)
    for name in tensors.keys() - found.keys():
        block = MTP_BLOCK.match(name)
        if block is None or block.group() not in starts:
            raise ModelError(f"{name} is joined of several weights of the checkpoint", name=name)
        found[name] = starts[block.group()] + name[block.end() :]
    return found


def _find_tables(model: PreTrainedModel, stored: set[str]) -> dict[str, str]:
    """The copies of the model's tables among ``stored`` → the name of the table in the model."""
    names = {id(module): name for name, module in model.named_modules()}
    return {
        name: f"{names[id(getattr(model, get)())]}.weight"
        for name in stored
        for end, get in _SHARED_TABLES.items()
        if name.endswith(f".{end}")
    }


@contextmanager
def _set_checkpoint(model: PreTrainedModel, folder: Path, stored: set[str]) -> Iterator[None]:
    """Let the model's config say where its checkpoint is and, if its class has no field for it, how many layers there
    are: each attends to all tokens."""
    # transformers reads both from the config. The number is counted in the names, which is what the checkpoint has.
    config = model.config.get_text_config()
    numbers = {int(found[1]) for name in stored if (found := _NUMBERED.match(name))}
    added = {"num_mtp_layers": len(numbers), "mtp_layer_types": ["full_attention"] * len(numbers)}
    added = {} if getattr(config, "num_mtp_layers", None) is not None else added
    before = model.config.name_or_path
    model.config.name_or_path = str(folder)
    vars(config).update(added)
    try:
        yield
    finally:
        model.config.name_or_path = before
        for name in added:
            delattr(config, name)
