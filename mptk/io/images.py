"""images: the pictures of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mptk.errors import MptkError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def find_images(data: str) -> list[Path]:
    """All pictures in the folder ``data`` and below, in the order of their paths.

    Raises:
        MptkError: there is no such folder, or it has none.
    """
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise MptkError(f"this model reads images, and {data} is no folder of them; give one with --data, or random")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise MptkError(f"{data} holds no image ({', '.join(SUFFIXES)}); give a folder with some")
    return found


def open_image(path: Path) -> Any:
    """The picture as a PIL image, RGB. Raises MptkError if it cannot be read."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MptkError("pillow is not installed, and it reads images; run: pip install 'mptk[images]'") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise MptkError(f"{path} is no image that can be read ({error}); remove it or give another folder") from error
