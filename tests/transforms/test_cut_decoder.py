"""A plan cuts the decoder with its cache as it cuts the plain forward: same families, same logits, smaller cache.

It reaches for passes.frontend.trace_decoder: the decoder step is no public program.
"""

from __future__ import annotations

import pytest
import torch
from tiny_decoders import FUSED, GROUPED, SLIDING, tiny_decoder
from transformers import BloomConfig

import mptk
from mptk import analyze, trace
from mptk.ir import Analysis
from mptk.ort.decoder import OrtDecoder
from mptk.testing import draw_plan
from passes.frontend.trace_decoder import trace_decoder
from passes.pipelines import emit_onnx


def listing(analysis: Analysis) -> list[tuple[str, int, int, int]]:
    return [(f.name, f.size, f.scopes, len(f.groups)) for f in analysis.families]


@pytest.mark.parametrize(("kind", "heads"), [(GROUPED, 1), (SLIDING, 1), (FUSED, 3)])
def test_plan_cuts_decoder_and_plain_forward_alike(kind, heads, tmp_path):
    model = tiny_decoder(kind)
    plain, decoder = analyze(trace(model, dynamic=True)), analyze(trace_decoder(model))
    assert listing(plain) == listing(decoder)
    plan = draw_plan(plain, share=0.5)
    reference, step = mptk.rewrite(plain, plan), mptk.rewrite(decoder, plan)
    caches = [node.meta["val"] for node in step.list_placeholders() if node.name in step.user_inputs[3:]]
    assert [value.shape[1] for value in caches] == [heads] * 4
    runtime = OrtDecoder(emit_onnx(step, tmp_path), threads=1)
    ids = torch.randint(3, 97, (2, 9))
    with torch.no_grad():
        expected = reference(ids)
    logits, cache = runtime.prefill(ids[:, :6].numpy())
    torch.testing.assert_close(torch.from_numpy(logits), expected[:, :6], atol=1e-4, rtol=0)
    logits, _ = runtime.decode(ids[:, 6:].numpy(), cache)
    torch.testing.assert_close(torch.from_numpy(logits), expected[:, 6:], atol=1e-4, rtol=0)
    assert {value.shape()[1] for value in cache.values.values()} == {heads}


def test_decoder_with_batched_products_of_symbolic_sizes_is_cut(tmp_path):
    """Bloom adds its position biases by ``baddbmm``."""
    model = tiny_decoder(BloomConfig(hidden_size=48, n_head=6, n_layer=1, vocab_size=97))
    decoder = analyze(trace_decoder(model))
    step = mptk.rewrite(decoder, draw_plan(decoder, ["heads", "ffn"], share=0.5))
    ids, mask, positions = torch.randint(3, 97, (2, 5)), torch.ones(2, 5, dtype=torch.long), torch.arange(5)[None]
    with torch.no_grad():
        expected, *_ = step(ids, mask, positions.expand(2, -1), *[torch.zeros(2, 3, 0, 8)] * 2)
    logits = OrtDecoder(emit_onnx(step, tmp_path), threads=1).compute_logits(ids.numpy())
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
