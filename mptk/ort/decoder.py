"""decoder: decoders in ONNX Runtime, with their KV cache.

``OrtDecoder`` reads token ids, or embeddings that the graphs of ``Embeddings`` make. ``OrtEncoderDecoder`` runs an
encoder once and the decoder of its output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch
from torch import Tensor

from mptk.compat.onnxruntime import run_on_values
from mptk.errors import FileError
from mptk.ort.graph_files import MERGED_FILE, find_onnx_file
from mptk.ort.sessions import CPU, OrtGraph, locate_memory, open_file

PAST_KEYS = "past_key_values."
"""Start of the names of a cache's inputs."""
Ids = npt.NDArray[np.int64]
TokensArray = npt.NDArray[np.generic]
"""Token ids, int64 [batch, n], or embeddings [batch, n, hidden]."""
LogitsArray = npt.NDArray[np.float32]
NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


@dataclass(frozen=True)
class Cache:
    """The KV cache after a step, in the runtime's memory.

    ``values``: input name → keys or values of a layer, [batch, heads, length, dim].
    ``mask``: [batch, length], 1 for a token, 0 for padding.
    """

    values: Mapping[str, ort.OrtValue]
    mask: Ids

    @property
    def length(self) -> int:
        return int(self.mask.shape[1])


class OrtDecoder:
    """An ONNX decoder with the inputs and outputs of ``passes/targets/onnx/emit.py``.

    A decoder that reads embeddings also takes token ids: ``embed_tokens.onnx`` beside it looks them up.

    Args:
        path: a folder with the graph in it or in ``onnx``, or the file.
        device: where it runs, if ONNX Runtime has an execution provider for it; else it runs on the CPU (``sessions``).
            On a CUDA device the cache stays there.
        threads: threads of one operator; 0: one for each core.

    Raises:
        MptkError: there is no such file, ONNX Runtime refuses it, or it is not a decoder with a KV cache.
    """

    def __init__(self, path: str | Path, device: torch.device = CPU, *, threads: int = 0) -> None:
        # Refuse what is not a decoder with a cache: with the reason, if it belongs to an encoder.
        file = find_onnx_file(path)
        self.session = open_file(file, device, threads)
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.past = [name for name in self.inputs if name.startswith(PAST_KEYS)]
        reads = [name for name in ("input_ids", EMBEDDINGS) if name in self.inputs]
        if "encoder_hidden_states" in self.inputs:
            raise FileError(
                f"{file} reads an encoder's output; generate with transformers, optimum or transformers.js", name=file
            )
        if not self.past or len(reads) != 1:
            raise FileError(
                f"{file} is not a decoder with a KV cache: its inputs are {', '.join(self.inputs)}; export one with "
                "mptk",
                name=file,
            )
        # A quantised decoder reads the embeddings of its own scheme, if there are any.
        self.reads = reads[0]
        ending = file.stem.removeprefix(Path(MERGED_FILE).stem)
        self.embeddings = Embeddings(file.parent, device, ending) if self.reads == EMBEDDINGS else None
        self.presents = [name.replace("past_key_values", "present") for name in self.past]
        self.outputs = ["logits", *self.presents]
        self.memory = locate_memory(self.session, device)

    @property
    def providers(self) -> list[str]:
        """The execution providers that run it, the one that is asked first coming first."""
        return list(self.session.get_providers())

    @property
    def metadata(self) -> dict[str, str]:
        """The exporter's metadata (plan hash, versions)."""
        return dict(self.session.get_modelmeta().custom_metadata_map)

    def prefill(
        self, tokens: TokensArray, mask: Ids | None = None, positions: Ids | None = None
    ) -> tuple[LogitsArray, Cache]:
        """Run a prompt. ``mask`` [batch, sequence]: 0 for padding on either side.

        Returns the logits, [batch, sequence or 1, vocab], and the cache. ``positions``: [batch, sequence], or [axes,
        batch, sequence] for a model whose positions have several axes; by default they count tokens, not padding.
        """
        mask = np.ones(tokens.shape[:2], dtype=np.int64) if mask is None else mask
        return self._run(tokens, mask, self.make_empty(len(tokens)), positions)

    def decode(self, tokens: TokensArray, cache: Cache, positions: Ids | None = None) -> tuple[LogitsArray, Cache]:
        """Run the next tokens, n in each row, after those in ``cache``, which stays usable."""
        return self._run(tokens, np.ones(tokens.shape[:2], dtype=np.int64), cache, positions)

    def step(
        self, tokens: TokensArray, mask: Ids, cache: Cache, positions: Ids | None = None
    ) -> tuple[LogitsArray, Cache]:
        """``decode``, in which some of the new tokens may be padding: ``mask`` is 0 for these."""
        return self._run(tokens, mask, cache, positions)

    def compute_logits(self, ids: Ids) -> LogitsArray:
        """Logits of whole sequences without padding: [batch, sequence or 1, vocab]."""
        return self.prefill(ids)[0]

    def compute_torch_logits(self, ids: Tensor) -> Tensor:
        """``compute_logits`` as a tensor. Raises MptkError if the graph gives only the last position's."""
        if self.last_only:
            raise FileError(
                "the graph gives logits of the last position only; export it with --logits all", name="logits"
            )
        return torch.from_numpy(self.compute_logits(ids.numpy()))

    @property
    def last_only(self) -> bool:
        """Whether the graph gives logits of the last position only."""
        return bool(self.session.get_outputs()[0].shape[1] == 1)

    @property
    def vocabulary(self) -> int | None:
        """How many tokens there are logits for; None if the graph does not say."""
        size = self.session.get_outputs()[0].shape[-1]
        return size if isinstance(size, int) else None

    @property
    def half(self) -> bool:
        """Whether the graph computes in float16."""
        return bool(self.inputs[self.past[0]].type == "tensor(float16)")

    def make_empty(self, batch: int) -> Cache:
        """An empty cache."""
        return self.make_filled(batch, 0)

    def make_filled(self, batch: int, length: int) -> Cache:
        """A cache of ``length`` random positions. The cost of a decoding step does not depend on its values."""
        rng = np.random.default_rng(0)
        values = {}
        for name in self.past:
            _, heads, _, dim = self.inputs[name].shape
            numbers = rng.standard_normal((batch, heads, length, dim), dtype=np.float32)
            typed = numbers.astype(NUMPY_TYPES[self.inputs[name].type])
            values[name] = ort.OrtValue.ortvalue_from_numpy(typed, *self.memory)
        return Cache(values, np.ones((batch, length), dtype=np.int64))

    def count_position_bytes(self, batch: int) -> int:
        """The size of one position in a cache of ``batch`` rows."""
        shapes = [(self.inputs[name].shape, NUMPY_TYPES[self.inputs[name].type]) for name in self.past]
        return sum(batch * shape[1] * shape[3] * np.dtype(kind).itemsize for shape, kind in shapes)

    def make_feeds(
        self, tokens: TokensArray, mask: Ids, cache: Cache, positions: Ids | None = None
    ) -> dict[str, ort.OrtValue]:
        """The inputs of one step by name. The cache is not copied.

        ``tokens``: n new ones in each row. ``mask``: [batch, cache.length + n], for the cache and the new tokens.
        """
        arrays: dict[str, TokensArray] = {self.reads: self._read(tokens), "attention_mask": mask}
        if "position_ids" in self.inputs:
            arrays["position_ids"] = self._count_positions(mask, tokens.shape[1]) if positions is None else positions
        values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return {**values, **cache.values}

    def _read(self, tokens: TokensArray) -> TokensArray:
        """The tokens as the graph reads them: ids, or their embeddings."""
        if tokens.ndim > 2:
            return tokens
        ids = tokens.astype(np.int64, copy=False)
        if self.embeddings is None:
            return ids
        return self.embeddings(torch.from_numpy(ids)).numpy()

    def _count_positions(self, mask: Ids, count: int) -> Ids:
        """The positions of the last ``count`` tokens, if these count tokens and not padding."""
        # Padding on the left has position 0, which nothing attends to. Several axes count alike for text.
        found = np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -count:]
        shape = self.inputs["position_ids"].shape
        return np.broadcast_to(found, (shape[0], *found.shape)) if len(shape) > 2 else found

    def bind_step(self, tokens: TokensArray, mask: Ids, cache: Cache) -> ort.IOBinding:
        """Inputs (``make_feeds``) and outputs, bound for a step that runs many times. Embeddings are looked up before.

        For different steps, ``run_on_values`` is faster: binding all tensors of the cache again takes longer.
        """
        # ONNX Runtime copies nothing that is bound where it is read.
        binding = self.session.io_binding()
        for name, value in self.make_feeds(tokens, mask, cache).items():
            binding.bind_ortvalue_input(name, value)
        for name, place in zip(self.outputs, self._place_outputs(), strict=True):
            binding.bind_output(name, *place)
        return binding

    def _place_outputs(self) -> list[tuple[str, int]]:
        """Where each output goes: logits to the CPU, and the cache to where it is read."""
        return [("cpu", 0), *[self.memory] * len(self.presents)]

    def _run(self, tokens: TokensArray, mask: Ids, cache: Cache, positions: Ids | None) -> tuple[LogitsArray, Cache]:
        if tokens.ndim < 2 or mask.shape != tokens.shape[:2] or len(cache.mask) != len(tokens):
            raise ValueError(f"tokens {tokens.shape}, mask {mask.shape} and a cache for {len(cache.mask)} do not fit")
        mask = np.concatenate([cache.mask, mask], axis=1)
        feeds = self.make_feeds(tokens, mask, cache, positions)
        logits, *present = run_on_values(self.session, feeds, self.outputs, self._place_outputs())
        return logits.numpy(), Cache(dict(zip(self.past, present, strict=True)), mask)


EMBEDDING_FILE, VISION_FILE = "embed_tokens.onnx", "vision_encoder.onnx"
EMBEDDINGS = "inputs_embeds"
"""The decoder's input in place of ``input_ids``."""
IMAGE_TOKEN = "image_token"
"""The key in a graph's metadata of the token in whose places the features of images stand."""


class Embeddings:
    """The graphs beside a decoder that reads embeddings.

    ``ending``: of quantised graphs' names, such as ``"_q4"``. A missing graph is replaced by the float one.

    Raises:
        MptkError: there is no ``embed_tokens.onnx``, or ONNX Runtime refuses it.
    """

    def __init__(self, folder: Path, device: torch.device = CPU, ending: str = "") -> None:
        self.folder, self.device, self.ending = folder, device, ending
        self.tokens = self._open_graph(EMBEDDING_FILE)

    @cached_property
    def images(self) -> OrtGraph:
        """The vision encoder. Raises MptkError if there is none."""
        return self._open_graph(VISION_FILE)

    def _open_graph(self, name: str) -> OrtGraph:
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
        # The features of all images in a row go where the text has tokens for them.
        marks = ids == int(self.tokens.metadata[IMAGE_TOKEN])
        features = self.images(images)
        if int(marks.sum()) != len(features):
            raise FileError(
                f"the text has {int(marks.sum())} tokens for images, and the vision encoder makes {len(features)} of "
                "them; correct processor_config.json",
                name="processor_config.json",
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


ENCODER_FILE = "encoder_model.onnx"
HIDDEN = "last_hidden_state"
DECODER_IDS = "decoder_input_ids"
DECODER_NAMES = {"attention_mask": "encoder_attention_mask", DECODER_IDS: "input_ids", HIDDEN: "encoder_hidden_states"}
"""Name in the model → optimum's name of the decoder's input, in the order of these inputs."""


class OrtEncoderDecoder(OrtGraph):
    """The two graphs of ``mptk/features/encoder_decoder/form.py``: the decoder's, with the encoder's beside it.

    Args:
        file: the decoder's graph. The encoder's is beside it and of the same scheme.
        device: see ``OrtDecoder``.

    Raises:
        MptkError: a graph is missing, or ONNX Runtime refuses it.
    """

    def __init__(self, file: Path, device: torch.device = CPU) -> None:
        # Such as ``_q4`` of decoder_model_merged_q4.onnx.
        ending = file.stem.removeprefix(Path(MERGED_FILE).stem)
        beside = file.with_name(ENCODER_FILE)
        self.encoder = OrtGraph(beside.with_stem(beside.stem + ending), device)
        super().__init__(file, device)

    def __call__(self, inputs: Mapping[str, Tensor], calls: Sequence[int] | None = None) -> Tensor:
        """Logits [rows, tokens, vocabulary] of the text in ``inputs``.

        ``calls``: how many tokens the decoder reads in each call; None: all at once.
        """
        # Both caches are empty at first. The first call fills the one of the encoder's output, for the calls after it.
        made = {**inputs, HIDDEN: self.encoder(inputs)}
        given = {new: made[name] for name, new in DECODER_NAMES.items() if name in made}
        ids, cache, logits = inputs[DECODER_IDS], self.make_empty(PAST_KEYS, len(inputs[DECODER_IDS])), []
        for part in ids.split(list(calls or [ids.shape[1]]), 1):
            found, *present = self.run_all({**given, "input_ids": part, **cache})
            cache = dict(zip(cache, present, strict=True))
            logits.append(found)
        return torch.cat(logits, 1)
