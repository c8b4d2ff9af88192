"""images: the pictures of a folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from mptk.errors import MptkError
from mptk.io.media import media_files

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def find_images(data: str) -> list[Path]:
    """All pictures in the folder ``data`` and below. Errors are those of ``media_files``."""
    return media_files(data, "images", SUFFIXES)


def open_image(path: Path) -> Any:
    """The picture as a PIL image, RGB. Raises MptkError if it cannot be read, or is as large as only bombs are."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MptkError("pillow is not installed, and it reads images; run: pip install 'mptk[images]'") from error
    try:
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(path) as image,
        ):
            return image.convert("RGB")
    except Exception as error:  # each format's reader has errors of its own
        raise MptkError(f"{path} is no image that can be read ({error}); remove it or give another folder") from error
