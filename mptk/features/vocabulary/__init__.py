"""Vocabulary: remove the tokens that a text never uses, so that a model of few languages or of code gets smaller.

``mptk prune MODEL --vocabulary TEXT`` removes rows of the embedding and of the head, and rewrites the tokenizer; the
logits of the kept tokens stay the dense model's. docs/vocabulary.md tells more.
"""

from dataclasses import dataclass

from mptk.config import CUT, PRUNE, CoreSettings, declare_setting
from mptk.errors import InputError
from mptk.protocols import Feature


@dataclass(frozen=True, init=False, repr=False, eq=False)  # only the joined settings are made: start-up counts
class VocabularySettings(CoreSettings):
    """The setting of this feature."""

    vocabulary: str | None = declare_setting(
        None,
        "Remove the tokens that this text never uses; same forms as --data.",
        CUT,
        PRUNE,
        form="source",
        in_plan=True,
        after="keep",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inputs is not None and self.vocabulary is not None:
            raise InputError(
                "vocabulary trimming needs a text model; leave out --inputs or --vocabulary", name="vocabulary"
            )

    @property
    def converts(self) -> bool:
        return self.vocabulary is not None or super().converts

    @property
    def renumbers_tokens(self) -> bool:
        return self.vocabulary is not None or super().renumbers_tokens


FEATURE = Feature(
    "vocabulary",
    "remove the tokens that a text never uses",
    page="docs/vocabulary.md",
    settings=VocabularySettings,
    conversions={"vocabulary": "mptk.features.vocabulary.convert:TrimmedVocabulary"},
    rows={"vocabulary": "mptk.features.vocabulary.row:VocabularyRow"},
    views={"vocabulary": "mptk.features.vocabulary.row:VocabularyView"},
)
