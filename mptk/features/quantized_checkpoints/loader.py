"""loader: a quantised checkpoint as a model."""

from __future__ import annotations

from pathlib import Path

from mptk.io.loaders import Loader


class QuantizedLoader(Loader):
    """A checkpoint folder whose config names a quantisation."""

    conversion = 3

    def takes(self, folder: Path) -> bool:
        from mptk.io.untrusted import is_quantized

        return is_quantized(folder)

    def explain_conversion(self, model: str, path: Path) -> str:
        from mptk.features.quantized_checkpoints.formats import read_quantization

        method = read_quantization(path)["quant_method"]
        return f"{model} is quantised ({method}): its weights were read as floats, and the result has float weights"

    def convert(self, path: Path, folder: Path) -> None:
        from mptk.features.quantized_checkpoints.formats import read_quantization, write_float

        write_float(path, read_quantization(path), folder)


QUANTIZED = QuantizedLoader()
