"""rewritten: write a pruned folder again with weights that its user changed in memory, and prove it.

The plan stays, so the structure is that of the first run. Weights, ONNX and other files are written and proven as in
``prune``; nothing is trained. The quality is measured again if the samples of the first run are in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from mptk.chain.describe import measured, publish_report
from mptk.chain.job import Finished, Given, Job
from mptk.chain.prune import cut_down, started, written_folder
from mptk.compile.changes import COMPENSATION, stored_weights, widened
from mptk.config.choices import IN_MEMORY
from mptk.config.recipe import RECIPE_FILE
from mptk.config.settings import Settings
from mptk.errors import MptkError
from mptk.io.untrusted import load_tensors
from mptk.ir.resolved_plan import renumbering
from mptk.ir.weights import Weights
from mptk.proof.claims import proof_samples
from mptk.protocols.chain import Chosen, Compiled, Prepared
from mptk.protocols.report import Report
from mptk.protocols.values import Context, SampleSets
from mptk.reading import damaged

WEIGHTS_CHANGED = "the weights were changed in memory after the proof of the cut, as by training, and proven again"
"""The note of a folder that was written again."""


@dataclass(frozen=True)
class ChangedWeights:
    """Weights of a pruned model that differ from its folder's.

    Attributes:
        folder: the folder that was pruned.
        report: its report.
        weights: the present weights, by the small model's names.
        sets: the samples of the run that made the folder; None if they are not in memory.
    """

    folder: Path
    report: Report
    weights: Mapping[str, Tensor]
    sets: SampleSets | None = None

    def adopt(self, prepared: Prepared) -> Chosen:
        """The plan with the changed weights as trained ones."""
        assert prepared.plan is not None
        assert prepared.cut is not None
        analysis, cut = prepared.analysis, prepared.cut
        stored = self._read_stored(prepared)
        named = {*self.report.trained}
        if (biases := self.folder / COMPENSATION).is_file():  # the method changed these, too
            named |= load_tensors(biases, damaged(biases)).keys()
        new, found = renumbering(analysis, cut).new, dict[str, Tensor]()
        for name in analysis.weights:
            there = new(name)
            if name not in analysis.program.state or there is None or there not in self.weights:
                continue
            weight = self.weights[there]
            if name in named or there not in stored or not stored[there].to(weight.dtype).equal(weight):
                found[name] = weight
        return Chosen(prepared.plan, cut, widened(analysis, cut, Weights(found)), tuple(found))

    def keep_recipe(self, folder: Path) -> None:
        """Put the first run's recipe into ``folder``: it says how the cut was made, and no run repeats the rest."""
        shutil.copy(self.folder / RECIPE_FILE, folder)

    def _read_stored(self, prepared: Prepared) -> Weights:
        return stored_weights(self.folder, prepared.loaded.trust)

    def check_adopted(self, compiled: Compiled) -> None:
        """Raise MptkError if the cut model would not have these weights, for example a norm's that the cut scales."""
        expected, stored = compiled.program.state_dict(), self._read_stored(compiled.prepared)
        for name, weight in self.weights.items():
            there = expected if name in expected else stored  # a class may have weights that it does not use
            if name not in there or not there[name].to(weight.dtype).equal(weight):
                raise MptkError(
                    f"{name} was changed in memory, and the cut makes this weight anew from the dense model's; write "
                    "the model by itself with model.save_pretrained(DIR), or leave this weight as it was"
                )


def write_changed_weights(changed: ChangedWeights, job: Job, settings: Settings, context: Context) -> Finished:
    """Write the folder of ``job`` with changed weights, and prove it. ``settings``: only what computes counts.

    Raises:
        MptkError: as ``mptk.prune``; or a changed weight is one that the cut makes anew.
    """
    found: Finished = started(
        partial(_write_and_prove, changed),
        replace(job, given=changed.adopt, samples=lambda _: Given(), needs=None),  # data is not read again
        replace(settings, data=IN_MEMORY, eval_data=None),  # nor looked for: the current folder may be another one
        context,
        trains=False,
    )
    return found


def _write_and_prove(changed: ChangedWeights, job: Job, prepared: Prepared, context: Context) -> Finished:
    before, sets = changed.report, changed.sets
    if sets is None:
        samples, _ = proof_samples(changed.folder, prepared.task.examples(prepared.loaded.model))
        sets = SampleSets(samples, samples, samples, "", prepared.task.sequences)
    compiled, witnessed = cut_down(job, prepared, sets, context)
    changed.check_adopted(compiled)
    report = written_folder(job, compiled, sets, witnessed, context, changed.keep_recipe)
    report = replace(
        report,
        changed=True,
        **{name: getattr(before, name) for name in ("settings", "splits", "data", "recovery", "search")},
        **{name: getattr(before, name) for name in ("vocabulary", "kv_heads")},
        notes=list(dict.fromkeys([*before.notes, *report.notes, WEIGHTS_CHANGED])),
    )
    if changed.sets is not None:
        report = measured(report, compiled, sets, job.out, context)
    else:
        publish_report(report, compiled, job.out)
    return Finished(report, compiled, sets)
