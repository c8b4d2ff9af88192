"""shape_search: rank the legal ways to divide the budget, before one of them is cut.

1. Each candidate is measured without training (``shape_losses.py``).
2. The best of these, unlike each other, are trained for a while, and the better half goes on (``halving.py``). The loss
   before training does not predict the best division (``docs/shapes.md``), so this decides.
"""

from __future__ import annotations

from dataclasses import replace

from mptk.errors import MptkError
from mptk.methods.division.budget import WidthSearch
from mptk.methods.division.halving import halved
from mptk.methods.division.shape_losses import Search
from mptk.protocols.chain import Prepared
from mptk.protocols.shapes import Shapes, ranked
from mptk.protocols.values import Context, SampleSets


def search_shapes(prepared: Prepared, sets: SampleSets, context: Context) -> Shapes:
    """The candidates of ``prepared``, ranked. What is known of each is kept in ``context.folder``.

    Raises:
        MptkError: no sample is held out to measure on; or what was kept is damaged.
    """
    assert context.folder is not None
    if sets.held_out is None:
        raise MptkError("a search measures shapes on samples of their own, and there is only one; give more --data")
    search = Search(prepared, sets, context, context.folder)
    found = halved(search, search.before_training())
    task, s = prepared.task, prepared.settings
    protocol = (
        f"mean loss on {len(search.samples)} samples of {search.samples.positions} tokens of "
        f"{task.named(prepared.loaded.model, s.data)}, which nothing was fitted to or trained on; units by "
        f"{search.criterion} from {len(sets.calibration)} other samples"
    )
    return Shapes(
        prepared.source,
        protocol,
        "perplexity" if task.classes and not task.compares else "loss",
        search.dense(),
        ranked(found),
    )


def winner(prepared: Prepared, found: Shapes) -> Prepared:
    """``prepared`` with the widths of the best shape alone, as if each had been given with ``--width``."""
    p = prepared
    settings = replace(p.settings, widths=dict(found.best.widths), search=False)
    search = WidthSearch(p.analysis, p.legal, p.cost, p.loaded.model, p.method, p.target, settings)
    return replace(p, candidates=tuple(search.candidates()), shapes=found)
