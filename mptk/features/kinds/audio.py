"""audio: sounds of a folder, as the model's feature extractor makes them."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor

from mptk.errors import DataError, FileError, ModelError
from mptk.io import Loaded
from mptk.progress import Count
from mptk.tasks.inputs.base import EXAMPLES, FileInputs, Named, load_preprocessor

EXAMPLE_SECONDS = 1
RATE = 16_000
"""Samples a second of an example; a model's feature extractor has its own rate."""
Sound = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Audio(FileInputs):
    """``input_features`` (a spectrogram, [samples, mel bins, frames]) or ``input_values`` (the wave, [samples, n])."""

    name: str
    what, suffixes = "WAV files", (".wav",)

    def make_example(self, model: nn.Module) -> Named:
        config = model.config
        generator = torch.Generator().manual_seed(0)
        if self.name == "input_values":
            return {self.name: torch.randn(EXAMPLES, EXAMPLE_SECONDS * RATE, generator=generator)}
        bins = getattr(config, "num_mel_bins", None) or 80  # as Whisper has
        positions = getattr(config, "max_source_positions", None)
        if positions is None:
            raise ModelError(
                f"{type(model).__name__} does not say how many frames it reads; give --inputs (docs/kinds.md)",
                name=type(model).__name__,
            )
        stride = 2  # of the convolutions before the positions, in Whisper and its kin
        return {self.name: torch.randn(EXAMPLES, bins, stride * positions, generator=generator)}

    def prepare(self, loaded: Loaded, files: Sequence[Path], progress: Count) -> Named:
        """The files as the model's feature extractor prepares them; shorter sounds are padded by it."""
        extractor = load_preprocessor(loaded, AutoFeatureExtractor, "feature extractor")
        rate = extractor.sampling_rate
        sounds = []
        for done, file in enumerate(files, 1):
            sounds.append(read_sound(file, rate))
            progress(done, len(files))
        # The extractor pads spectrograms to one length, but not waves: these are cut to the shortest.
        shortest = min(map(len, sounds))
        if self.name == "input_values":  # raw waves are not padded: all get the length of the shortest
            sounds = [sound[:shortest] for sound in sounds]
        made: Tensor = extractor(sounds, sampling_rate=rate, return_tensors="pt")[self.name]
        return {self.name: made.float()}


def read_sound(path: Path, rate: int) -> Sound:
    """The samples of a WAV file with 16 bits a sample, all channels averaged, in −1..1."""
    remedy = f"convert it with ffmpeg -i IN -ar {rate} -ac 1 -c:a pcm_s16le OUT.wav"
    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2 or file.getframerate() != rate:
                bits, own = 8 * file.getsampwidth(), file.getframerate()
                raise DataError(
                    f"{path} has {bits} bits and {own} samples a second, not 16 and {rate}; {remedy}", name=path
                )
            # The header may claim more frames than the file can hold, and as much memory.
            frames = min(file.getnframes(), path.stat().st_size // (2 * file.getnchannels()))
            raw = np.frombuffer(file.readframes(frames), np.int16)
            if not len(raw):
                raise DataError(f"{path} holds no sound; remove it or give another folder", name=path)
            sound: Sound = (raw.reshape(-1, file.getnchannels()).mean(1) / 32768).astype(np.float32)
            return sound
    except (wave.Error, EOFError, OSError, ValueError, ArithmeticError, RuntimeError) as error:
        raise FileError(f"{path} is not a readable WAV file ({error}); {remedy}", name=path) from error


SPECTROGRAMS, WAVES = Audio("input_features"), Audio("input_values")
