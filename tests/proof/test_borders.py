"""Positions at which a decoder begins to compute something else, and a proof that goes beyond them.

It reaches for passes.analysis.borders and mptk.tasks.decoder_form: a border is found long before a proof reports it.
"""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import SLIDING, tiny_decoder
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedConfig

from mptk import trace
from mptk.ir import make_token_samples
from mptk.proof.proof import make_proof_batches
from mptk.protocols import Use
from mptk.tasks.decoder_form import UNPADDED, decode_samples
from passes.analysis.borders import find_config_borders, find_graph_borders, reach


class Windowed(nn.Module):
    """Sums of a token's embeddings over a window, and a bias that depends on how far away the token is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bias = nn.Embedding(97, 12), nn.Embedding(6, 1)
        self.register_buffer("chunk", torch.tensor(21), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1])
        far = at[:, None] - at
        seen = (far >= 0) & (far < 17) & (at[:, None] // self.chunk == at // self.chunk)
        bias = self.bias(torch.clamp(far // 4, min=0, max=5))[..., 0]
        noise = self.bias.weight.long().sum() + 1234  # of a parameter, no position
        return (seen * (bias + noise * 0)) @ self.embed(ids)


def test_the_graph_tells_windows_chunks_and_buckets():
    tokens = torch.arange(14).reshape(2, 7) % 11 + 1
    found = set(find_graph_borders(trace(Windowed(), (tokens,), dynamic=True)))
    assert {17, 21, 4, 5} <= found
    assert 1234 not in found


@pytest.mark.parametrize(
    ("values", "borders"),
    [
        ({"sliding_window": 512}, {512}),
        ({"attention_chunk_size": 8192}, {8192}),
        ({"local_attention": 128}, {128}),
        ({"window_size": [256, 512]}, {256, 512}),
        ({"text_config": {"sliding_window": 4096}}, {4096}),
        ({"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 4096}}, {4096}),
        ({"max_position_embeddings": 77, "rope_parameters": {"rope_type": "dynamic"}}, {77}),
        ({"max_position_embeddings": 77, "rope_parameters": {"rope_type": "default"}}, set()),
        ({"sliding_window": None, "use_sliding_window": False, "chunk_size_feed_forward": 0}, set()),
    ],
)
def test_the_config_tells_them_too(values, borders):
    assert set(find_config_borders(values)) == borders


def test_a_proof_stops_at_its_bound_and_at_the_models_last_position():
    program = trace(tiny_decoder(SLIDING, sliding_window=64, max_position_embeddings=128), dynamic=True)
    config = LlamaConfig(max_position_embeddings=128)

    def with_window(*windows: int) -> PreTrainedConfig:
        config.attention_window = list(windows)
        return config

    found = reach(program, with_window(90, 125, 4000), bound=1024)
    assert (found.borders, found.beyond, found.length) == ((64, 90), (), 98)
    lengths = [reach(program, with_window(), bound=bound, least=192).length for bound in (1024, 100)]
    assert lengths == [120, 100]
    config.max_position_embeddings = 4096
    assert reach(program, config, bound=1024, least=192).length == 192
    config.max_target_positions = 56
    assert reach(program, config, bound=1024, least=192).length == 48
    config = LlamaConfig(max_position_embeddings=128)
    short = reach(program, with_window(90), bound=80)
    assert (short.borders, short.beyond) == ((64,), (90,))
    assert short.note.endswith("--proof-length 98 covers it")


def test_a_long_row_is_text_again_and_again_and_there_are_three_short_ones_and_one_whatever_the_samples_are():
    windows = torch.arange(60).reshape(3, 20)
    short, long = (batch.inputs["input_ids"] for batch in make_proof_batches(make_token_samples(windows), 130))
    assert torch.equal(short, windows)
    assert torch.equal(long[0, :61], torch.tensor([*range(60), 0]))
    assert long.shape == (1, 130)
    short, one = (batch.inputs["input_ids"] for batch in make_proof_batches(make_token_samples(windows[:2]), 12))
    assert torch.equal(short, windows[[0, 1, 0]])
    assert torch.equal(one, windows[:1])


class Counting:
    """A decoder whose logits are the position, and which keeps what it was asked."""

    last_only, reads = False, "input_ids"

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def make_empty(self, batch: int) -> int:
        return 0

    def step(self, ids: Tensor, mask: object, cache: int, positions: None) -> tuple[object, int]:
        self.asked.append((cache, ids.shape[1]))
        after = cache + ids.shape[1]
        return torch.arange(cache, after).float().reshape(1, -1, 1).numpy(), after


def test_decoding_steps_cross_each_border_with_the_cache():
    counting, samples = Counting(), make_token_samples(torch.zeros(1, 40, dtype=torch.long))
    found = decode_samples(UNPADDED, counting, Use([10, 12, 39]), samples)
    assert found.places.tolist() == [list(range(40))]
    assert found.outputs[0, :, 0].tolist() == list(range(40))
    ends = [cache + many for cache, many in counting.asked]
    assert ends == [*range(7, 17), 33, 34, 35, 38, 39, 40]
