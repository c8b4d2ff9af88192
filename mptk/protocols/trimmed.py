"""trimmed: the model as it was given to a run that keeps some of its tokens alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mptk.io.models import Loaded
from mptk.ir.families import Analysis
from mptk.ir.plan import Tokens
from mptk.ir.samples import Samples
from mptk.staged.staged import Executor
from passes.analysis.vocabulary import Vocabulary


@dataclass(frozen=True)
class Trimmed:
    """A model with all its tokens, and those that stay.

    ``loaded``, ``analysis``: the model as it was given. ``vocabulary``: where its tokens are counted.
    ``config_changes``: field → [old, new], of its config and its generation config. ``corpus``: what decided, by name.
    """

    loaded: Loaded
    analysis: Analysis
    vocabulary: Vocabulary
    tokens: Tokens
    config_changes: Mapping[str, Sequence[Any]]
    corpus: str

    def outputs(self, batch: Samples, executor: Executor) -> Tensor:
        """What the whole model gives for samples in the ids of the trimmed one: of logits, those of the kept tokens."""
        kept = torch.tensor(self.tokens.keep)
        pairs = zip(batch.tensors, self.vocabulary.inputs, strict=True)
        inputs = [kept[tensor] if is_ids else tensor for tensor, is_ids in pairs]
        found: Tensor = next(executor.outputs([self.analysis.program], [inputs]))
        return found.index_select(-1, kept.to(found.device)) if self.vocabulary.predicted else found

    @property
    def note(self) -> str:
        """What a reader of the figures must know."""
        return (
            f"{len(self.tokens.keep):,} of {self.tokens.of:,} tokens stay, those of {self.corpus}; the quality of the "
            "dense model is measured with these alone, and other text has more tokens than before"
        )

    def row(self) -> dict[str, Any]:
        """What the report says of it."""
        return {
            "of": self.tokens.of,
            "kept": len(self.tokens.keep),
            "corpus": self.corpus,
            "config_changes": {name: list(values) for name, values in self.config_changes.items()},
        }
