"""amounts: how many samples a run reads, writes and holds out, and its numbers in words."""

from __future__ import annotations

from collections.abc import Sequence

from mptk.config import Settings
from mptk.io import data
from mptk.methods import find_method
from mptk.protocols import list_stages
from mptk.report.view import format_count

# At most a ninth of the samples: most of a small text must be left to train on.
TRAINED_PER_HELD_OUT = 8
"""Hold out at most one sample per this number of training samples."""


def count_samples(settings: Settings, *, own: bool = False) -> int:
    """Most samples that a run takes to calibrate and train on, with the held-out ones.

    ``own``: whether the model writes them. As that takes long, it writes none for the training steps, which repeat the
    others. So `mptk shapes` and a run that searches and then trains have the same text.
    """
    s = settings
    # The largest of them, not their sum: calibration, features and training use the same samples.
    further = [stage.count_training_samples(s) for stage in list_stages()]
    used = max(s.windows, *further, 0 if own else s.steps * s.learning.training.batch)
    return used + count_held_out(s, used)


def count_held_out(settings: Settings, samples: int) -> int:
    """Number of held-out samples for ``samples`` training samples: at most a batch for training, more for features."""
    # The guard of training watches one batch (`take_guards`). What ranks divisions by these samples needs more.
    count = min(settings.learning.training.batch, max(1, samples // TRAINED_PER_HELD_OUT)) if settings.steps else 0
    return max([count, *(stage.count_held_out(settings, samples) for stage in list_stages())])


def count_measured(settings: Settings, count: int) -> int:
    """Windows that the model writes to measure on, beside ``count`` others; 0 if ``eval_data`` names a text."""
    return min(count, settings.eval_windows) if settings.eval_data is None else 0


def count_written(settings: Settings) -> int:
    """Windows of text that the model writes itself: to calibrate and train on, and to measure on."""
    count = count_samples(settings, own=True) if settings.data == data.SELF else 0
    return count + count_measured(settings, count)


def should_learn_masks(settings: Settings) -> bool:
    """Whether the run learns masks."""
    return not settings.fixed and find_method(settings.method).learns


def describe_numbers(settings: Settings) -> str:
    """The numbers of complete settings in words, and bfloat16 if they are computed in it."""
    found = [format_count(settings.steps, "training step")] if settings.steps else []
    found += [format_count(settings.windows, "calibration window")] if not settings.fixed else []
    for stage in list_stages():
        found += stage.describe_numbers(settings)
    found += (
        [f"{format_count(settings.distil_epochs, 'epoch')} of local distillation"] if settings.distil_epochs else []
    )
    numbers = join_words(found)
    return f"{numbers} in bfloat16" if numbers and settings.compute_dtype == "bfloat16" else numbers


def join_words(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
