"""numbers: models that give numbers, of which counts how far they move from the dense model's. Features share it."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from mptk.io import Runs
from mptk.progress import Progress
from mptk.protocols import OnnxForm, SampleSets
from mptk.reading import Json
from mptk.tasks.base import AutoLists, ComparedTask, explain_unlisted, measure_figures, sum_output_distances


@dataclass(frozen=True)
class Numbers(ComparedTask):
    """Fields as in ``Classifier``. ``ending``: how the names of models end that are in no list of transformers."""

    name: str
    summary: str
    lists: AutoLists
    gives: str
    onnx: OnnxForm
    ending: str = ""
    priority = 50
    classes = False

    def explain_refusal(self, config: PreTrainedConfig, classes: set[type[PreTrainedModel]]) -> str | None:
        if self.ending and classes and all(each.__name__.endswith(self.ending) for each in classes):
            return None
        return explain_unlisted(self.lists, config, classes, f"give {self.gives}")

    def measure_quality(self, runs: Runs, sets: SampleSets, progress: Progress) -> Json:
        samples = sets.evaluation
        protocol = (
            f"{sets.source}: mean over {len(samples)} samples of the distance of {self.gives} from the dense model's, "
            "relative to their norm"
        )
        return measure_figures(runs, samples.split(1), {"distance": sum_output_distances}, progress, protocol)
