"""The benchmark of types beside others' quantisers: its perplexity, its turns, its table."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.rounding import ROUNDS, make_table, measure_perplexity, time_in_turns

VOCABULARY = 32


def compute_next(sure):
    """A model that knows that each token is followed by the next number, as surely as ``sure`` says."""

    def compute(ids):
        logits = np.zeros((len(ids), VOCABULARY), dtype=np.float32)
        logits[np.arange(len(ids)), (ids + 1) % VOCABULARY] = sure
        return logits

    return compute


def test_perplexity_is_of_the_token_after_each():
    windows = torch.arange(16).reshape(2, 8)
    assert measure_perplexity(compute_next(0.0), windows) == pytest.approx(VOCABULARY)
    assert measure_perplexity(compute_next(100.0), windows) == pytest.approx(1.0)


class Slowing:
    """Takes longer from round to round, as on a machine that others begin to use."""

    def __init__(self, times):
        self.times, self.round = times, -1

    def measure_ms(self):
        self.round += 1
        if self.round == 0:
            return 1e6, 1e6
        return 100.0 * self.times * self.round, 10.0 * self.round


def test_ratios_are_of_the_same_round_and_the_first_round_warms_up():
    times = time_in_turns({("mptk", "float32"): Slowing(1), ("llama.cpp", "F32"): Slowing(2)})
    middle = (ROUNDS + 1) // 2
    assert times["mptk", "float32"]["prefill_ms"] == 100 * middle
    assert times["llama.cpp", "F32"] == {
        "prefill_ms": 200 * middle,
        "prefill_ratio": 2.0,
        "decode_ms": 10 * middle,
        "decode_ratio": 1.0,
    }


def test_changes_are_relative_to_our_float32_of_the_same_model():
    dense = {"by": "mptk", "type": "float32", "megabytes": 538.0, "prefill_ratio": 1.0, "decode_ratio": 1.0}
    rows = [
        {"model": "a", **dense, "perplexity": 20.0},
        {"model": "b", **dense, "perplexity": 40.0},
        {"model": "b", "by": "llama.cpp", "type": "Q4_0", "megabytes": 91.7, "perplexity": 44.0},
    ]
    assert make_table(rows).splitlines()[-1] == "| b | llama.cpp | Q4_0 | 92 | 44.00 | +10.0% |  |  |"
