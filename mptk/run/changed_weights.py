"""rewritten: write a pruned folder again with weights that its user changed in memory, and prove it.

The plan stays, so the structure is that of the first run. Weights, ONNX and other files are written and proven as in
``prune``; nothing is trained. The quality is measured again if the samples of the first run are in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from mptk.compile.cut import COMPENSATION, open_pruned_weights, widen_weights
from mptk.config.recipe import RECIPE_FILE
from mptk.errors import MptkError
from mptk.io.untrusted import load_tensors
from mptk.ir.resolved_plan import build_renumbering
from mptk.ir.weights import Weights
from mptk.proof.claims import read_proof_samples
from mptk.protocols.chain import Chosen, Compiled, Prepared
from mptk.protocols.values import SampleSets
from mptk.publish.folder import publish
from mptk.reading import make_damage_error
from mptk.run.describe import measure, publish_report
from mptk.run.prepare import prepare
from mptk.run.prune import Result, cut, keep_stages_on_failure, prove, write_report, write_targets
from mptk.run.pruned_folder import PrunedFolder
from mptk.run.run import Run
from mptk.trust import Trust

WEIGHTS_CHANGED = "the weights were changed in memory after the proof of the cut, as by training, and proven again"
"""The note of a folder that was written again."""


@dataclass(frozen=True)
class ChangedWeights(PrunedFolder):
    """A pruned folder whose model has other weights in memory.

    Attributes:
        weights: the present weights, by the small model's names.
        sets: the samples of the run that made the folder; None if they are not in memory.
    """

    reads_data: ClassVar[bool] = False

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    sets: SampleSets | None = None

    def read_estimator(self, trust: Trust) -> None:
        """Nothing is trained or read."""

    def read_choice(self, prepared: Prepared) -> Chosen:
        """The plan with the changed weights as trained ones."""
        assert prepared.plan is not None
        assert prepared.cut is not None
        analysis, cut = prepared.analysis, prepared.cut
        stored = self._read_stored(prepared)
        named = {*self.report.trained}
        if (biases := self.folder / COMPENSATION).is_file():  # the method changed these, too
            named |= load_tensors(biases, make_damage_error(biases)).keys()
        new, found = build_renumbering(analysis, cut).new, dict[str, Tensor]()
        for name in analysis.weights:
            there = new(name)
            if name not in analysis.program.state or there is None or there not in self.weights:
                continue
            weight = self.weights[there]
            if name in named or there not in stored or not stored[there].to(weight.dtype).equal(weight):
                found[name] = weight
        return Chosen(prepared.plan, cut, widen_weights(analysis, cut, Weights(found)), tuple(found))

    def _read_stored(self, prepared: Prepared) -> Weights:
        return open_pruned_weights(self.folder, prepared.loaded.trust)

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


def rewrite_folder(changed: ChangedWeights, run: Run) -> Result:
    """Write the folder again with changed weights, and prove it. Of ``run.settings`` only what computes counts.

    Raises:
        MptkError: as ``prune``; or a changed weight is one that the cut makes anew.
    """
    prepared, dense = prepare(changed, run)
    run = run.keep_in_folder(prepared.settings, prepared.origin.parts)
    with keep_stages_on_failure(prepared, run):
        sets = changed.sets
        if sets is None:
            samples, _ = read_proof_samples(changed.folder, prepared.task.make_examples(prepared.loaded.model))
            sets = SampleSets(samples, samples, samples, "", prepared.task.sequences)
        compiled, checked = cut(changed, prepared, sets, run)
        changed.check_adopted(compiled)
        with publish(run.out) as folder:
            notes = write_targets(compiled, sets, folder, run)
            proven = prove(compiled, sets, folder, checked, run)
            # The first run's recipe says how the cut was made, and no run repeats the rest.
            shutil.copy(changed.folder / RECIPE_FILE, folder)
            report = write_report(compiled, proven, sets, notes, folder, run)
        before = changed.report
        report = replace(
            report,
            changed=True,
            **{name: getattr(before, name) for name in ("settings", "splits", "data", "recovery", "search")},
            **{name: getattr(before, name) for name in ("vocabulary", "kv_heads")},
            notes=list(dict.fromkeys([*before.notes, *report.notes, WEIGHTS_CHANGED])),
        )
        if changed.sets is not None:
            report = measure(report, compiled, sets, run.out, run)
        else:
            publish_report(report, compiled, run.out)
    return Result(report, compiled, sets, dense)
