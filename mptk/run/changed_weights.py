"""changed_weights: write a pruned folder again with weights that its user changed in memory, and prove it.

The plan stays, so the structure is the first run's. Weights, ONNX and other files are written and proven as in
``prune``; nothing is trained. The quality is measured again if the samples of the first run are in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from mptk.compile.cut import COMPENSATION, compile_plan, open_pruned_weights, widen_weights
from mptk.config import RECIPE_FILE
from mptk.errors import ChangedError
from mptk.io import load_tensors
from mptk.ir import Weights, build_renumbering
from mptk.proof.claims import read_proof_samples
from mptk.protocols import Chosen, Compiled, Prepared, SampleSets
from mptk.publish.folder import publish
from mptk.reading import make_damage_error
from mptk.run.describe import measure, publish_report
from mptk.run.prepare import prepare
from mptk.run.prune import Result, keep_stages_on_failure, prove_outputs, write_report, write_targets
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

    # The proof has its samples in the folder. Data that the report names may be gone or changed by now.
    reads_data: ClassVar[bool] = False

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    sets: SampleSets | None = None

    def read_estimator(self, trust: Trust) -> None:
        """Nothing is trained or read."""

    def read_choice(self, prepared: Prepared) -> Chosen:
        """The plan with the changed weights as trained ones.

        Only weights that differ from the folder's become trained ones. The cut makes all others from the dense model
        again, so the proof still compares these with the dense model.
        """
        assert prepared.planned is not None
        analysis, cut = prepared.analysis, prepared.planned.cut
        stored = self._read_stored(prepared)
        # What an earlier run trained or corrected does not come from the dense model either, even if it is unchanged.
        named = {*self.report.trained}
        if (biases := self.folder / COMPENSATION).is_file():  # the method changed these, too
            named |= load_tensors(biases, make_damage_error(biases)).keys()
        new, found = build_renumbering(analysis, cut).find_new, dict[str, Tensor]()
        for name in analysis.weights:
            there = new(name)  # its name after the cut, which renumbers what follows a removed block or expert
            if name not in analysis.program.state or there is None or there not in self.weights:
                continue
            weight = self.weights[there]
            if name in named or there not in stored or not stored[there].to(weight.dtype).equal(weight):
                found[name] = weight
        changes = widen_weights(analysis, cut, Weights(found))
        return replace(prepared.planned, changes=changes, trained=tuple(found))

    def _read_stored(self, prepared: Prepared) -> Weights:
        return open_pruned_weights(self.folder, prepared.loaded.trust)

    def check_adopted(self, compiled: Compiled) -> None:
        """Raise MptkError if the cut model would not have these weights, for example of a norm that the cut scales."""
        expected, stored = compiled.program.state_dict(), self._read_stored(compiled.prepared)
        for name, weight in self.weights.items():
            there = expected if name in expected else stored  # a class may have weights that it does not use
            if name not in there or not there[name].to(weight.dtype).equal(weight):
                raise ChangedError(
                    f"{name} was changed in memory, and the cut makes this weight anew from the dense model's; write "
                    "the model by itself with model.save_pretrained(DIR), or leave this weight as it was",
                    name=name,
                )


def rewrite_folder(changed: ChangedWeights, run: Run) -> Result:
    """Write the folder again with changed weights, and prove it. Of ``run.settings`` only what computes counts.

    Raises:
        MptkError: as ``prune``; or a changed weight is one that the cut makes anew.
    """
    prepared, run = prepare(changed, run)
    with keep_stages_on_failure(prepared, run):
        sets = changed.sets
        if sets is None:  # the folder was opened: the samples of its proof are all that is left of the run's
            samples, _ = read_proof_samples(changed.folder, prepared.task.make_examples(prepared.loaded.model))
            sets = SampleSets(samples, samples, samples, "", prepared.task.sequences)
        chosen = changed.read_choice(prepared)
        compiled = compile_plan(prepared, chosen, sets.calibration, run)
        # The proof's reference has only the adopted weights, so it cannot see that one was not adopted.
        changed.check_adopted(compiled)
        with publish(run.out) as folder:
            notes = write_targets(compiled, sets, folder, run)
            proven = prove_outputs(compiled, sets, folder, [], run)
            # The first run's recipe says how the cut was made, and no run repeats the rest.
            shutil.copy(changed.folder / RECIPE_FILE, folder)
            report = write_report(compiled, proven, sets, notes, folder, run)
        before = changed.report
        # This run only computes. How units were chosen, on what data, and at what cost is the first run's to say.
        report = replace(
            report,
            changed=True,
            **{name: getattr(before, name) for name in ("settings", "splits", "data", "recovery", "rows")},
            notes=list(dict.fromkeys([*before.notes, *report.notes, WEIGHTS_CHANGED])),
        )
        if changed.sets is not None:
            report = measure(report, compiled, sets, run.out, run)
        else:  # the old figures are of other weights, and the samples of a proof are too few for new ones
            publish_report(report, compiled, run.out)
    return Result(report, compiled, sets, run)
