"""embeddings: the graphs whose results a decoder reads in place of token ids: of tokens, and of images."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mptk.errors import MptkError
from mptk.ort.sessions import CPU, OrtGraph

EMBEDDING_FILE, VISION_FILE = "embed_tokens.onnx", "vision_encoder.onnx"
EMBEDDINGS = "inputs_embeds"
IMAGE_TOKEN = "image_token"
"""The key in a graph's metadata of the token in whose places the features of images stand."""


class Embeddings:
    """The graphs beside a decoder that reads embeddings.

    ``ending``: of the names of quantised graphs, as ``"_q4"``; a missing graph is replaced by the float one.

    Raises:
        MptkError: there is no ``embed_tokens.onnx``, or ONNX Runtime refuses it.
    """

    def __init__(self, folder: Path, device: torch.device = CPU, ending: str = "") -> None:
        self.folder, self.device, self.ending = folder, device, ending
        self.tokens = self._graph(EMBEDDING_FILE)

    @cached_property
    def images(self) -> OrtGraph:
        """The vision encoder. Raises MptkError if there is none."""
        return self._graph(VISION_FILE)

    def _graph(self, name: str) -> OrtGraph:
        file = self.folder / name
        quantized = file.with_stem(file.stem + self.ending)
        return OrtGraph(quantized if quantized.is_file() else file, self.device)

    def __call__(self, ids: Tensor, images: Mapping[str, Tensor] | None = None) -> Tensor:
        """The embeddings [batch, n, hidden] of token ids [batch, n], with the features of ``images`` at their tokens.

        ``images``: the inputs of the vision encoder by name. Others are ignored.

        Raises:
            MptkError: there are more or fewer tokens of images than rows of features.
        """
        found = self.tokens({"input_ids": ids})
        if not images:
            return found
        marks = ids == int(self.tokens.metadata[IMAGE_TOKEN])
        features = self.images(images)
        if int(marks.sum()) != len(features):
            raise MptkError(
                f"the text has {int(marks.sum())} tokens for images, and the vision encoder makes {len(features)} of "
                "them; correct processor_config.json"
            )
        return found.masked_scatter(marks[..., None], features)

    def takes(self, images: Mapping[str, Tensor]) -> bool:
        """Whether the vision encoder runs on images of these sizes."""
        wanted = {value.name: value.shape for value in self.images.session.get_inputs()}
        return all(
            isinstance(size, str) or size == given
            for name, shape in wanted.items()
            for size, given in zip(shape, images[name].shape, strict=True)
        )
