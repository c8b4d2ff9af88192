"""audio: the sounds of a folder."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mptk.errors import MptkError
from mptk.io.media import media_files

SUFFIX = ".wav"
Sound = npt.NDArray[np.float32]


def find_sounds(data: str) -> list[Path]:
    """All WAV files in the folder ``data`` and below. Errors are those of ``media_files``."""
    return media_files(data, "WAV files", (SUFFIX,))


def read_sound(path: Path, rate: int) -> Sound:
    """The samples of a WAV file with 16 bits a sample, all channels averaged, in −1..1.

    Raises:
        MptkError: it is no such file, or has another rate than ``rate`` samples a second.
    """
    remedy = f"convert it with ffmpeg -i IN -ar {rate} -ac 1 -c:a pcm_s16le OUT.wav"
    try:
        with wave.open(str(path)) as file:
            if file.getsampwidth() != 2 or file.getframerate() != rate:
                bits, own = 8 * file.getsampwidth(), file.getframerate()
                raise MptkError(f"{path} has {bits} bits and {own} samples a second, not 16 and {rate}; {remedy}")
            frames = min(file.getnframes(), path.stat().st_size // (2 * file.getnchannels()))
            raw = np.frombuffer(file.readframes(frames), np.int16)
            if not len(raw):
                raise MptkError(f"{path} holds no sound; remove it or give another folder")
            sound: Sound = (raw.reshape(-1, file.getnchannels()).mean(1) / 32768).astype(np.float32)
            return sound
    except (wave.Error, EOFError, OSError, ValueError, ArithmeticError, RuntimeError) as error:
        raise MptkError(f"{path} is no WAV file that can be read ({error}); {remedy}") from error
