"""folder: a pruned folder, and the dense model's GGUF file if one is given, as the content of a GGUF file."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFWriter
from transformers import PreTrainedConfig

from mptk.config.choices import GgufType
from mptk.errors import MptkError
from mptk.io import models
from mptk.ir.plan import Plan
from mptk.ir.weights import Weights
from mptk.targets.gguf.architectures import ARCHITECTURES, Architecture
from mptk.targets.gguf.pattern import Pattern
from mptk.targets.gguf.settings import (
    DIVISORS,
    FREQUENCIES,
    architecture_of,
    head_dim,
    ignored_window,
    rope_divisors,
    write_settings,
)
from mptk.targets.gguf.tokenizer import write_tokenizer
from mptk.targets.gguf.weights import EQUAL, HEAD, GgufWeights, LayerWidths, arranged

GGUF_FAMILIES = ("q_heads", "kv_groups", "heads", "ffn", "layers", "hidden")
"""The families of a graph that a GGUF file can hold cut."""


class GgufFolder:
    """What the GGUF file of a pruned folder holds. ``layers``: the widths of each layer. ``notes``: for the user.

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
        self.place, self.config, self.pattern, self.name = place, config, pattern, name or place.name
        if config is not None:
            self.base, size, divisors = architecture_of(config), head_dim(config), rope_divisors(config)
        else:
            dense = _dense(place, plan, pattern)
            self.base, size, divisors = ARCHITECTURES[EQUAL], dense.head_dim, dense.tensor(FREQUENCIES)
        tied = bool(getattr(config, "tie_word_embeddings", False))
        tensors = arranged(weights, self.base, size, tied=tied)
        self.weights = GgufWeights(tensors.updated(divisors), self.base, size, kind)
        if pattern is not None:
            _check_pattern(pattern, self.base, self.weights)

    @property
    def layers(self) -> list[LayerWidths]:
        return self.weights.layers

    @property
    def notes(self) -> list[str]:
        window = None if self.config is None else ignored_window(self.config, self.base)
        ignored = f"llama.cpp attends to all tokens: after {window} tokens its results differ from the folder's"
        return [*self.weights.notes, *([ignored] if window else [])]

    def write(self, out: Path) -> None:
        """Write the file and read it back.

        Raises:
            ProofError: a tensor that was read back differs.
        """
        self.weights.write(out, self._describe)

    def _describe(self, writer: GGUFWriter) -> None:
        writer.add_name(self.name)
        if self.config is not None:
            write_settings(writer, self.config, self.base)
        if self.pattern is not None:
            self.pattern.fill(writer)
        else:
            tokenizer = models.load_tokenizer(str(self.place))
            write_tokenizer(writer, self.place, tokenizer, self.weights.table[0])


def _dense(place: Path, plan: Plan, pattern: Pattern | None) -> Pattern:
    """The pattern of a graph, which must be one of LLaMA."""
    if pattern is None:
        raise MptkError(f"{place} is a graph without a config; give the dense model's GGUF file by --like")
    if pattern.architecture != EQUAL:
        raise MptkError(
            f"{pattern.file} holds a {pattern.architecture} model; of graphs, mptk writes only {EQUAL} models as GGUF"
        )
    cut = {name for name, choice in plan.families.items() if choice.width < choice.of}
    if odd := {name for name in cut if name.partition(".")[0] not in GGUF_FAMILIES}:
        raise MptkError(f"{min(odd)} was cut, which a GGUF file cannot hold; cut only {', '.join(GGUF_FAMILIES)}")
    return pattern


def _check_pattern(pattern: Pattern, base: Architecture, weights: GgufWeights) -> None:
    if pattern.architecture != base.name:
        raise MptkError(
            f"{pattern.file} holds a {pattern.architecture} model and the folder a {base.name} model; give the GGUF "
            "file of the folder's dense model"
        )
    pattern.check(set(weights.tensors), weights.table, {HEAD, *DIVISORS})
