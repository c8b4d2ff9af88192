"""windows: the text that a run's settings name, as windows of token ids."""

from __future__ import annotations

from torch import Tensor

from mptk.config.settings import Settings
from mptk.io import data
from mptk.io.models import Loaded
from mptk.progress import Count


def calibration_windows(loaded: Loaded, settings: Settings, count: int, progress: Count) -> Tensor:
    """Up to ``count`` windows of the calibration text, int64 [n, length]. Errors are those of ``data.calibration``."""
    return data.calibration(
        loaded.whole() if settings.data == data.SELF else loaded.model,
        loaded.tokenizer,
        settings.data,
        count,
        settings.length,
        seed=settings.seed,
        progress=progress,
    )


def evaluation_windows(loaded: Loaded, settings: Settings, length: int) -> Tensor:
    """Windows of the evaluation text, int64 [n, length]. Errors are those of ``data.evaluation_windows``."""
    source = settings.eval_data or settings.data
    windows = data.evaluation_windows(loaded.tokenizer, source, length, settings.eval_windows)
    data.check_ids(loaded.model, windows)
    return windows
