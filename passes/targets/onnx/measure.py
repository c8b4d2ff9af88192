"""measure: second moments of an ONNX decoder's activations over tokens, computed in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from onnx import NodeProto, TensorProto, helper

from mptk.ort.decoder import EMBEDDINGS, Embeddings
from mptk.ort.sessions import CPU, WEIGHTS_FOLDER, open_session
from passes.targets.onnx.names import CACHE
from passes.targets.onnx.tensors import Floats

Text = npt.NDArray[np.int64]
"""Token ids [windows, length]."""

IDS_AND_EMBEDDINGS = ("input_ids", EMBEDDINGS)
"""A decoder reads one of these: the embeddings, if images are read, too."""
OF_TEXT: dict[str, Callable[[Text], Text]] = {
    "attention_mask": np.ones_like,
    "token_type_ids": np.zeros_like,
    "position_ids": lambda ids: np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
}
"""Name of an input → what it is for token ids [windows, length] without padding."""

TOKENS_AT_ONCE = 1024
"""Tokens in one run, or one window if that is longer. It bounds the memory of the activations."""
BYTES = 1 << 30
"""Size of the sums in one session, or of one value's sums if they are larger. Σ x xᵀ grows with the square of
the channels, so the graph runs once for each part of the values."""


def measure_onnx(
    file: Path,
    channels: Mapping[str, int],
    text: Text,
    what: Literal["squares", "products"],
    device: torch.device = CPU,
    *,
    tokens_at_once: int = TOKENS_AT_ONCE,
    most_bytes: int = BYTES,
) -> Iterator[tuple[str, Floats]]:
    """Sums over all tokens for each value: Σ x² [channels], or Σ x xᵀ [channels, channels].

    ``file``: a graph of ``emit_onnx`` in float32 that ``takes_text_inputs``. ``channels``: name of a value → size of
    its last axis. ``tokens_at_once``: in one run, or one window if that is longer; it bounds the memory of the
    activations. ``most_bytes``: of the sums in one session, or of one value's sums if they are larger.
    """
    measure = partial(_measure_sums, file, text, what, device, tokens_at_once)
    # 4 bytes a float.
    size = {name: 4 * count ** (1 if what == "squares" else 2) for name, count in channels.items()}
    part: list[str] = []
    for name in channels:
        if part and sum(map(size.__getitem__, part)) + size[name] > most_bytes:
            yield from measure({name: channels[name] for name in part}).items()
            part = []
        part.append(name)
    if part:
        yield from measure({name: channels[name] for name in part}).items()


def _measure_sums(
    file: Path, text: Text, what: str, device: torch.device, tokens_at_once: int, channels: Mapping[str, int]
) -> dict[str, Floats]:
    # The sums become outputs of the graph, so no activation leaves the runtime.
    proto = onnx.load(file, load_external_data=False)
    for name, count in channels.items():
        proto.graph.initializer.append(helper.make_tensor(f"{name}.shape", TensorProto.INT64, [2], [-1, count]))
        proto.graph.node.extend(_make_sum_nodes(name, what))
        shape = [count] if what == "squares" else [count, count]
        proto.graph.output.append(helper.make_tensor_value_info(f"{name}.sum", TensorProto.FLOAT, shape))
    # The session gets the changed graph as bytes, and still finds the weights beside the file.
    entries = {WEIGHTS_FOLDER: str(file.parent.resolve())}
    session = open_session(proto.SerializeToString(), device, entries=entries)
    sums: dict[str, Floats] = dict.fromkeys(channels, np.zeros((), dtype=np.float32))
    names = [f"{name}.sum" for name in channels]
    for start in range(0, len(text), step := max(1, tokens_at_once // text.shape[1])):
        feeds = _make_feeds(session, text[start : start + step], file)
        for name, found in zip(channels, session.run(names, feeds), strict=True):
            sums[name] = sums[name] + found
    return sums


def _make_sum_nodes(name: str, what: str) -> list[NodeProto]:
    flat, axes, result = f"{name}.flat", f"{name}.axes", f"{name}.sum"
    nodes = [helper.make_node("Reshape", [name, f"{name}.shape"], [flat])]
    if what == "products":
        return [*nodes, helper.make_node("Gemm", [flat, flat], [result], transA=1)]
    nodes.append(helper.make_node("Constant", [], [axes], value_ints=[0]))
    return [*nodes, helper.make_node("ReduceSumSquare", [flat, axes], [result], keepdims=0)]


def takes_text_inputs(inputs: Collection[str]) -> bool:
    """Whether a graph with inputs of these names reads text: token ids, or embeddings that a graph beside it makes."""
    return not {*IDS_AND_EMBEDDINGS}.isdisjoint(inputs) and all(
        name in (*IDS_AND_EMBEDDINGS, *OF_TEXT) or name.startswith(CACHE) for name in inputs
    )


def _make_feeds(session: ort.InferenceSession, ids: Text, file: Path) -> dict[str, npt.NDArray[np.generic]]:
    """The inputs of a prompt without padding, with an empty cache, if the graph has one."""
    inputs = {i.name: i.shape for i in session.get_inputs()}
    given: dict[str, npt.NDArray[np.generic]] = {name: make(ids) for name, make in OF_TEXT.items()}
    given["input_ids"] = ids
    if EMBEDDINGS in inputs:
        given[EMBEDDINGS] = Embeddings(file.parent)(torch.from_numpy(ids)).numpy()
    # A model of images and text counts positions on several axes, which are equal for text.
    if len(axes := inputs.get("position_ids", ids.shape)) > ids.ndim:
        given["position_ids"] = np.broadcast_to(given["position_ids"], (axes[0], *ids.shape))
    empty = {
        name: np.zeros((len(ids), shape[1], 0, shape[3]), dtype=np.float32)
        for name, shape in inputs.items()
        if name.startswith(CACHE)
    }
    return {name: ({**given, **empty})[name] for name in inputs}
