"""KV heads: merge the KV heads of each layer to fewer, so that the KV cache of a model shrinks.

For whoever serves long contexts: ``mptk prune MODEL --kv-heads 3`` merges the heads in closed form, and all query heads
stay; with ``--sparsity`` the merged model is cut further. docs/plan.md and docs/how-to/kv-heads.md tell more.
"""

from dataclasses import dataclass

from mptk.config import CUT, SEARCH, CoreSettings, declare_setting
from mptk.protocols import Feature


@dataclass(frozen=True, init=False, repr=False, eq=False)  # only the joined settings are made: start-up counts
class KvHeadsSettings(CoreSettings):
    """The setting of this feature."""

    kv_heads: int | None = declare_setting(
        None,
        "Merge the KV heads of each layer to this number; all query heads stay.",
        CUT,
        SEARCH,
        within=(1, 1 << 20),
        in_plan=True,
        after="keep",
    )

    @property
    def converts(self) -> bool:
        return self.kv_heads is not None or super().converts


FEATURE = Feature(
    "kv_heads",
    "merge KV heads, so that the KV cache shrinks",
    page="docs/how-to/kv-heads.md",
    settings=KvHeadsSettings,
    conversions={"kv_heads": "mptk.features.kv_heads.convert:MergedHeads"},
    rows={"kv_heads": "mptk.features.kv_heads.row:HeadsRow"},
    views={"kv_heads": "mptk.features.kv_heads.row:HeadsView"},
)
