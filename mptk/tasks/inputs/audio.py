"""audio: sounds of a folder, as the model's feature extractor makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor

from mptk.config.settings import Settings
from mptk.errors import MptkError
from mptk.io.audio import find_sounds, read_sound
from mptk.io.models import Loaded
from mptk.io.text.sources import RANDOM
from mptk.progress import Count
from mptk.tasks.inputs.base import Inputs, Named, random_inputs

SECONDS = 1
RATE = 16_000
BATCH = 2


@dataclass(frozen=True)
class Audio(Inputs):
    """``input_features`` (a spectrogram, [samples, mel bins, frames]) or ``input_values`` (the wave, [samples, n])."""

    name: str

    def example(self, model: nn.Module) -> Named:
        config: Any = model.config
        generator = torch.Generator().manual_seed(0)
        if self.name == "input_values":
            return {self.name: torch.randn(BATCH, SECONDS * RATE, generator=generator)}
        bins = getattr(config, "num_mel_bins", None) or 80
        positions = getattr(config, "max_source_positions", None)
        if positions is None:
            raise MptkError(
                f"{type(model).__name__} does not say how many frames it reads; give --inputs (docs/kinds.md)"
            )
        stride = 2  # of the convolutions before the positions, in Whisper and its kin
        return {self.name: torch.randn(BATCH, bins, stride * positions, generator=generator)}

    def calibration(self, loaded: Loaded, settings: Settings, count: int, progress: Count) -> Named:
        if settings.data == RANDOM:
            return random_inputs(self.example(loaded.model), count, {}, settings.seed)
        files = find_sounds(settings.data)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(settings.seed))
        return self._prepared(loaded, [files[i] for i in order[:count]], progress)

    def evaluation(self, loaded: Loaded, settings: Settings) -> Named:
        data = settings.eval_data or settings.data
        if data == RANDOM:
            return random_inputs(self.example(loaded.model), settings.eval_windows, {}, settings.seed + 1)
        return self._prepared(loaded, find_sounds(data)[: settings.eval_windows], lambda done, total: None)

    def _prepared(self, loaded: Loaded, files: Sequence[Path], progress: Count) -> Named:
        """The files as the model's feature extractor prepares them; shorter sounds are padded by it."""
        extractor = _extractor(loaded)
        rate = extractor.sampling_rate
        sounds = []
        for done, file in enumerate(files, 1):
            sounds.append(read_sound(file, rate))
            progress(done, len(files))
        shortest = min(map(len, sounds))
        if self.name == "input_values":  # raw waves are not padded: all get the length of the shortest
            sounds = [sound[:shortest] for sound in sounds]
        made: Tensor = extractor(sounds, sampling_rate=rate, return_tensors="pt")[self.name]
        return {self.name: made.float()}


def _extractor(loaded: Loaded) -> Any:
    try:
        return AutoFeatureExtractor.from_pretrained(loaded.path, trust_remote_code=loaded.trusted)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise MptkError(
            f"{loaded.source} has no feature extractor that transformers can load ({reason}); add its "
            "preprocessor_config.json, or give --data random"
        ) from error
