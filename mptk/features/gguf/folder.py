"""folder: a pruned folder as the content of a GGUF file, with the dense model's GGUF file if one is given.

Vocabulary and settings of that file, the ``Pattern``, also hold for the cut model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import torch
from gguf import GGUFWriter
from torch import Tensor
from transformers import PreTrainedConfig

from mptk.errors import FileError, InputError, TargetError, take_first_line
from mptk.features.gguf import GgufType
from mptk.features.gguf.architectures import (
    ARCHITECTURES,
    DIVISORS,
    FREQUENCIES,
    Architecture,
    compute_rope_divisors,
    find_architecture,
    find_head_dim,
    find_ignored_window,
    write_settings,
)
from mptk.features.gguf.check import GgufFile, check_fields, check_tensors
from mptk.features.gguf.tokenizer import write_tokenizer
from mptk.features.gguf.weights import ARCHITECTURE, EQUAL, HEAD, GgufWeights, LayerWidths, arrange_weights, copy_field
from mptk.files.outputs import GGUF_MARK
from mptk.io import models
from mptk.ir import Plan, Weights
from mptk.reading import make_damage_error
from passes.verify import Difference

DROPPED = (
    ARCHITECTURE,
    "general.file_type",
    "general.quantization",
    "general.size_label",
    "quantize.",
)
"""Prefixes of fields that describe the pattern's own weights, and would be wrong for others."""
TOKENS = "tokenizer.ggml.tokens"
WRITER_FIELD = "general.source.writer"
"""The field that marks a file as mptk's, which a later one may replace."""


class Pattern(GgufFile):
    """The dense model's GGUF file.

    Raises:
        MptkError: it cannot be read, or is not a language model's.
    """

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        try:
            self.architecture = str(self._read_value(ARCHITECTURE))
            hidden, heads = (
                int(self._read_value(f"{self.architecture}.{name}"))
                for name in ("embedding_length", "attention.head_count")
            )
            # A file may leave the size of a head out if it is hidden size / heads.
            length: Any = self.values.get(f"{self.architecture}.attention.key_length")
            self.head_dim = hidden // heads if length is None else int(length)
            self.tokens = len(self._read_value(TOKENS))
        except (TypeError, ValueError, ArithmeticError) as error:  # a value of another kind
            raise make_damage_error(file)(take_first_line(error)) from error

    def _read_value(self, name: str) -> Any:
        if name not in self.values:
            raise FileError(
                f"{self.file} has no {name}, so it is not a language model; give the GGUF file of the dense model",
                name=self.file,
            )
        return self.values[name]

    def fill(self, writer: GGUFWriter) -> None:
        """Write the fields that the writer does not have yet."""
        for name in self.kept:
            own = name.startswith(f"{self.architecture}.")
            key = f"{writer.arch}.{name.removeprefix(f'{self.architecture}.')}" if own else name
            copy_field(writer, key, self.fields[name])  # what follows from the folder counts more

    @property
    def kept(self) -> dict[str, object]:
        """The fields that hold for a cut model, too: they describe neither the own weights nor single layers."""
        own = f"{self.architecture}."
        return {
            name: value
            for name, value in self.values.items()
            if not name.startswith(DROPPED) and not (name.startswith(own) and isinstance(value, list))
        }

    def read_tensor(self, name: str) -> dict[str, Tensor]:
        """The float32 tensor ``name`` by its name, if the file has it."""
        return {name: torch.from_numpy(self.tensors[name].data.copy())} if name in self.tensors else {}

    def check(self, names: set[str], table: tuple[int, int], free: set[str]) -> None:
        """Raise MptkError if a model with these tensors and this embedding table was not cut from the pattern's model.

        ``free``: tensors that only one of the two may have.
        """
        # The same tokens, and no more channels. Then the same tensors in each layer; layers themselves may be gone.
        dense = self.shapes.get("token_embd.weight", (0, 0))
        if table[0] != dense[0] or table[0] != self.tokens or table[1] > dense[1]:
            raise FileError(
                f"{self.file} has another vocabulary or hidden size than the folder; give the GGUF file of its dense "
                "model, or leave --like out",
                name=self.file,
            )
        blocks = {name.split(".")[1] for name in names if name.startswith("blk.")}
        wanted = {name for name in self.shapes if not name.startswith("blk.") or name.split(".")[1] in blocks}
        if apart := (wanted ^ names) - free:
            raise FileError(
                f"{min(apart)} is only in one of the folder and {self.file}, so they belong to different models; give "
                "the GGUF file of the folder's dense model",
                name=self.file,
            )


FIELDS, TENSORS = "GGUF fields", "GGUF tensors"
"""The stages of the proof."""
MOST_ROUNDED = 0.15
"""Errors of numbers are given as shares of the largest one of their tensor; 4 bits have steps of an eighth of it, and
the scale of a block is itself rounded. Each number is checked against its own block's bound."""
GGUF_FAMILIES = ("q_heads", "kv_groups", "heads", "ffn", "layers", "hidden")
"""The families of a graph that a GGUF file can hold cut."""


class GgufFolder:
    """What the GGUF file of a pruned folder holds. ``layers``: the widths of each layer. ``notes``: for the user.
    ``proof``: the differences of the file that ``mptk.gguf`` wrote.

    Args:
        place: the folder.
        weights: its weights.
        plan: the plan of its cut.
        config: its config; None for a graph, which has none.
        pattern: the dense model's GGUF file. The vocabulary comes from it, or else from the folder.
        kind: the type of the matrices.
        name: what the file calls the model; by default the folder's name.

    Raises:
        MptkError: the pattern is of another model, or llama.cpp cannot compute the folder's.
    """

    def __init__(
        self,
        place: Path,
        weights: Weights,
        plan: Plan,
        config: PreTrainedConfig | None,
        pattern: Pattern | None,
        kind: GgufType,
        name: str = "",
    ) -> None:
        # What llama.cpp expects of the model: by its config or, for a graph, by the dense model's file.
        self.place, self.config, self.pattern, self.name = place, config, pattern, name or place.name
        if config is not None:
            self.base, size, divisors = find_architecture(config), find_head_dim(config), compute_rope_divisors(config)
        else:
            dense = _check_graph_pattern(place, plan, pattern)
            self.base, size, divisors = ARCHITECTURES[EQUAL], dense.head_dim, dense.read_tensor(FREQUENCIES)
        self.tokenizer = None if pattern is not None else models.load_tokenizer(str(place))
        # The tensors, in the file's names and form.
        tied = bool(getattr(config, "tie_word_embeddings", False))
        tensors = arrange_weights(weights, self.base, size, tied=tied)
        self.head_dim = size
        self.weights = GgufWeights(tensors.with_entries(divisors), self.base, size, kind)
        if pattern is not None:
            _check_pattern(pattern, self.base, self.weights)
        # What llama.cpp does otherwise, though the file is right.
        self.notes, self.proof = list(self.weights.notes), list[Difference]()
        if config is not None and (window := find_ignored_window(config, self.base)):
            ignored = f"llama.cpp attends to all tokens: after {window} tokens its results differ from the folder's"
            self.notes.append(ignored)

    @property
    def layers(self) -> list[LayerWidths]:
        return self.weights.layers

    def write(self, out: Path) -> list[Difference]:
        """Write the file and read it back. Returns and raises as ``check``."""
        self.weights.write(out, self._describe)
        return self.check(out)

    def check(self, out: Path) -> list[Difference]:
        """Compare a file with the folder: its fields, and its tensors, which may differ by what their type rounds.

        Raises:
            MptkError: the file is damaged.
            ProofError: a field or a tensor differs.
        """
        found = GgufFile(out)
        found.check_format()
        # Of narrow matrices most may be float16, so the commonest type is only the likeliest one that was asked for.
        asked: list[GgufType] = [found.type, *get_args(GgufType)]
        kinds = [self.weights.choose_kinds(kind) for kind in asked]
        worst = check_tensors(found, self.weights.tensors, kinds)
        known = {}
        if (pattern := self.pattern) is not None:
            known = {name.removeprefix(f"{pattern.architecture}."): value for name, value in pattern.kept.items()}
        check_fields(found, self.config, self.tokenizer, known, self.base, self.head_dim, self.name)
        return [Difference(FIELDS, 0.0, 0.0, 0.0), Difference(TENSORS, worst, worst, MOST_ROUNDED)]

    def _describe(self, writer: GGUFWriter) -> None:
        writer.add_name(self.name)
        writer.add_string(WRITER_FIELD, GGUF_MARK)
        if self.config is not None:
            write_settings(writer, self.config, self.base)
        if self.pattern is not None:
            self.pattern.fill(writer)
        if self.tokenizer is not None:
            write_tokenizer(writer, self.place, self.tokenizer, self.weights.table[0])


def _check_graph_pattern(place: Path, plan: Plan, pattern: Pattern | None) -> Pattern:
    """The pattern of a graph, which must be one of LLaMA."""
    if pattern is None:
        raise InputError(
            f"{place} is a graph without a config; give the dense model's GGUF file by --like", name="like"
        )
    if pattern.architecture != EQUAL:
        raise TargetError(
            f"{pattern.file} holds a {pattern.architecture} model; of graphs, mptk writes only {EQUAL} models as GGUF",
            name=pattern.architecture,
        )
    # Without a config nothing else says what a cut of another family would mean.
    cut = {name for name, choice in plan.families.items() if choice.width < choice.of}
    if odd := {name for name in cut if name.partition(".")[0] not in GGUF_FAMILIES}:
        raise TargetError(
            f"{min(odd)} was cut, which a GGUF file cannot hold; cut only {', '.join(GGUF_FAMILIES)}",
            name=min(odd),
            nearest=GGUF_FAMILIES,
        )
    return pattern


def _check_pattern(pattern: Pattern, base: Architecture, weights: GgufWeights) -> None:
    if pattern.architecture != base.name:
        raise FileError(
            f"{pattern.file} holds a {pattern.architecture} model and the folder a {base.name} model; give the GGUF "
            "file of the folder's dense model",
            name=pattern.file,
        )
    pattern.check(set(weights.tensors), weights.table, {HEAD, *DIVISORS})
