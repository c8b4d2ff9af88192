"""The benchmark of budgets: which way counts as the best of all runs, and what the advised one is compared with."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.budgets import TYPES, Run, describe_way, judge, make_advice, read_way
from mptk.features.advise.advice import FLOAT_TYPE, Advice, Ceiling, Figures, Point, Way

BYTES = {FLOAT_TYPE: 400, "int8": 100, "int4": 60}
LOSS = {FLOAT_TYPE: 3.0, "int8": 3.01, "int4": 3.2}


def make_figures(loss):
    return {"text": Figures(loss, loss - LOSS[FLOAT_TYPE], None, math.expm1(loss - LOSS[FLOAT_TYPE]), 0.0)}


def list_ways():
    """The dense model, and a cut by half that costs 0.5 nats, in each type. What takes fewer bytes takes less time."""
    for sparsity in (0.0, 0.5):
        for kind in (FLOAT_TYPE, *TYPES):
            size = BYTES[kind] * (1 - sparsity / 2)
            yield Way(kind, sparsity, {}, size, {"decode": size, "prefill": size}, make_figures(LOSS[kind] + sparsity))


@pytest.fixture
def advice():
    dense = Point({}, 0.0, 1, 1, None, make_figures(LOSS[FLOAT_TYPE]))
    return Advice("m", "", "perplexity", 0.1, dense, (), {}, {}, ways=tuple(list_ways()), limits=Ceiling())


def make_run(way, slower=1.0):
    return Run({phase: slower * ms for phase, ms in way.ms.items()}, round(way.bytes), math.exp(way.texts["text"].loss))


def test_if_runs_are_as_predicted_the_advised_way_is_the_best_of_each_budget(advice):
    rows = list(judge(advice, [make_run(way) for way in advice.ways]))
    assert len(rows) == 10
    assert {row["limit"] for row in rows} == {"decode_ms", "prefill_ms", "bytes"}
    for row in rows:
        for name in ("predicted", "measured"):
            assert row[name]["way"] == row["best"]
            assert row[name]["quality"] == pytest.approx(0)
            assert row[name]["price"] <= 0


def test_ways_that_a_file_has_are_judged_as_those_that_were_made(advice):
    runs = [make_run(way) for way in advice.ways]
    described = json.loads(json.dumps([describe_way(*each) for each in zip(advice.ways, runs, strict=True)]))
    ways, again = zip(*map(read_way, described), strict=True)
    assert list(judge(make_advice("m", ways, 512), again)) == list(judge(advice, runs))


def test_a_way_that_is_slower_than_predicted_is_over_the_budget_until_it_is_measured(advice):
    runs = [make_run(way, 3.0 if way.type == "int8" else 1.0) for way in advice.ways]
    rows = [row for row in judge(advice, runs) if row["limit"] == "decode_ms"]
    over = [row for row in rows if row["predicted"]["price"] > 0]
    assert over
    for row in rows:
        assert row["measured"]["way"] == row["best"]
        assert row["measured"]["price"] <= 0
