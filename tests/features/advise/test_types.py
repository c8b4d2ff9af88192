"""Advice with types: the cuts of a decoder in float32, int8 and int4, beside a limit. Operators take made-up times."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import done
from inside import Inside
from transformers import AutoModelForCausalLM

import mptk
from mptk.errors import InputError
from mptk.features.advise.advice import FLOAT_TYPE, Advice, Ceiling, Figures, Point, Way
from mptk.features.advise.made import choose_further_ways
from mptk.features.advise.view import build_way_table, describe_sources, describe_ways
from mptk.ort.bench import Measurement
from mptk.testing import draw_weights, expect_error, make_config, make_llama

ASKED = {"sparsities": [0.2, 0.4], "samples": 8, "length": 32, "align": 8, "eval_windows": 4, "progress": None}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 97, (12, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def advice(made_up_times, laboratory, ids):
    return mptk.advise(str(laboratory.open_model()), data=ids, max_decode_ms=1e6, **ASKED)


def test_every_cut_is_there_in_every_type(advice):
    assert {way.type for way in advice.ways} == {FLOAT_TYPE, "int8", "int4"}
    assert len(advice.ways) == 3 * (1 + len(advice.division))
    for way in advice.ways:
        cut = next(point for point in (advice.dense, *advice.division) if point.sparsity == way.sparsity)
        assert way.widths == cut.widths
        assert set(way.ms) == {"decode"}
        if way.type == FLOAT_TYPE:
            assert way.texts == {text: replace(each, agreement=None) for text, each in cut.texts.items()}
    assert advice.find_way().rise == min(way.rise for way in advice.ways if not way.sparsity)


@pytest.mark.usefixtures("made_up_times")
def test_size_and_loss_of_a_rounded_cut_are_those_of_its_graph(advice, laboratory, ids, tmp_path):
    """A cut as `prune` makes it, whose int8 graph is measured on the windows of the advice."""
    way = next(way for way in advice.ways if way.type == "int8" and way.sparsity == advice.division[0].sparsity)
    asked = {"method": "wanda", "reconstruct": True, "widths": dict(way.widths), "quantize": ("int8",), "samples": 8}
    asked |= {"data": ids[:8], "eval_data": ids[8:], "length": 32, "align": 8, "progress": None}
    pruned = mptk.prune(str(laboratory.open_model()), tmp_path / "out", sparsity=round(way.sparsity, 4), **asked)
    row = pruned.report.quantized["int8"]
    (figures,) = way.texts.values()
    assert row["quality"] == pytest.approx(float(torch.tensor(figures.loss).exp()), rel=0.01)
    assert row["bytes"] == pytest.approx(way.bytes, rel=0.1)  # a tiny graph is mostly nodes


def test_only_what_is_limited_is_timed(laboratory, ids):
    found = mptk.advise(str(laboratory.open_model()), data=ids, types=["int8"], max_size=10**9, **ASKED)
    assert all(way.ms == {} for way in found.ways)
    assert {way.type for way in found.ways} == {FLOAT_TYPE, "int8"}


# ---- ways that are made ----


@pytest.fixture(scope="module")
def rounds_badly():
    """A decoder that int4 and a small cut cost about 4 % each, and text that it writes itself."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 3, "num_key_value_heads": 3, "hidden_size": 96, "intermediate_size": 256}
    model = draw_weights(AutoModelForCausalLM.from_config(make_config("llama", pad_token_id=None, **sizes)).eval(), 0.1)
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 97, (40, 1), generator=draw)
    with torch.no_grad():
        for _ in range(47):
            shares = model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(shares, 1, generator=draw)], 1)
    return model, ids


MADE = {"sparsities": [0.1, 0.2], "samples": 16, "length": 48, "eval_windows": 24, "measure": True, "progress": None}


@pytest.fixture(scope="module")
def made(rounds_badly, made_up_times, quick_bench):
    model, ids = rounds_badly
    return mptk.advise(model, data=ids, max_decode_ms=1e6, **MADE)


def test_the_loss_of_a_cut_in_a_type_is_predicted_within_a_percent(made):
    """At two points at least, of which each has two rises of several percent to add up."""
    assert {way.type for way in made.checked} == {"int8", "int4"}
    (text,) = made.texts
    assert min(way.texts[text].change for way in made.checked) > 0.04
    assert max(way.texts[text].change for way in made.checked) > 0.08
    for way in made.checked:
        assert way.compute_miss(text) == pytest.approx(0, abs=0.01)
    said = " ".join(describe_sources(made))
    assert all(f"({way.compute_miss(text):+.2%}) in ONNX Runtime" in said for way in made.checked)


def test_the_best_ways_are_made_and_the_best_of_these_is_advised(made):
    best, done = made.find_way(), [way for way in made.ways if way.measured is not None]
    assert best in done
    assert len(done) >= 3
    for way in done:
        assert set(way.measured.ms) == {"decode"}
        assert way.measured.ms["decode"] > 0
        assert way.measured.bytes == pytest.approx(way.bytes, rel=0.1)
        assert way.sparsity or way.measured.bytes == way.bytes, "the dense graphs are not made twice"
    table = build_way_table(made)
    rows = {(row[0].strip("★ "), row[1]): row for row in table.rows}
    for way in done:
        row = rows[way.type, f"{way.sparsity:.1%}" if way.sparsity else "dense"]
        assert row[2:4] == [f"{way.ms['decode']:.2f}", f"{way.measured.ms['decode']:.2f}"]


def take(inside: Inside, turns: Iterator[float]) -> None:
    """How many milliseconds the graphs of each round of measurements take."""

    def time(_: object, graphs: list[str], cases: list[Any], **__: object) -> list[Measurement]:
        ms = next(turns)
        return [Measurement(name, cases[0], ms, 0, 0, 1, 1, 1, 1) for name in graphs]

    inside.around("mptk.features.advise.made.time_graphs", time)


@pytest.mark.usefixtures("made_up_times")
def test_ways_that_turn_out_too_slow_are_followed_by_others(rounds_badly, inside):
    take(inside, iter([5.0, 1.0]))
    model, ids = rounds_badly
    found = mptk.advise(model, data=ids, max_decode_ms=4.0, **MADE)
    slow = [way for way in found.ways if way.measured is not None and way.measured.ms["decode"] == 5.0]
    assert len(slow) >= 3
    assert all(way.is_within(found.limits) == (way not in slow) for way in found.ways if way.measured is not None)
    assert found.find_way().measured.ms == {"decode": 1.0}


@pytest.mark.usefixtures("made_up_times")
def test_if_nothing_meets_the_limit_the_cheapest_ways_are_made(rounds_badly, inside):
    """Predicted times may be too long."""
    take(inside, itertools.repeat(1e-6))
    model, ids = rounds_badly
    found = mptk.advise(model, data=ids, max_decode_ms=1e-3, **MADE)
    assert sum(way.measured is not None for way in found.ways) >= 3
    assert found.find_way().measured is not None


@pytest.mark.usefixtures("made_up_times")
def test_memory_of_decoding_is_predicted():
    """Of a process that really decodes after 16,000 tokens, whose caches are most of it. Cuts have smaller ones."""
    model = make_llama(layers=4, num_key_value_heads=6, max_position_embeddings=20_000)
    ids = torch.randint(0, 300, (12, 32), generator=torch.Generator().manual_seed(0))
    found = mptk.advise(model, data=ids, max_memory=10**12, context=16_000, measure=True, **ASKED)
    cache = 2 * 4 * 6 * 16 * 4 * 16_000
    assert found.ways[0].memory > 2 * cache
    done = [way for way in found.ways if way.measured is not None]
    assert min(way.memory for way in done) < 1.8 * cache
    for way in done:
        assert way.memory == pytest.approx(way.measured.memory, rel=0.05)
    assert all(way.ms == {} for way in found.ways)
    small = replace(found, limits=replace(found.limits, memory=2 * cache))
    assert small.find_way().widths["heads"] < 6
    with expect_error(InputError, nearest=(20_000,)):
        mptk.advise(model, data=ids, max_memory=10**12, context=20_000, **ASKED)


@pytest.mark.usefixtures("made_up_times")
def test_a_context_sets_the_length_of_the_cache_in_decoding(laboratory, ids):
    model, asked = str(laboratory.open_model()), {**ASKED, "sparsities": [0.2], "types": [], "max_decode_ms": 1e6}
    default, same, longer = (mptk.advise(model, data=ids, context=n, **asked) for n in (None, 512, 1024))
    assert default.ways == same.ways
    for way, other in zip(default.ways, longer.ways, strict=True):
        assert other.ms["decode"] > way.ms["decode"]


def test_what_is_no_comparison_of_a_decoder_is_refused(laboratory):
    for kind, more, name in (
        ("decoder", {"measure": True}, "measure"),
        ("encoder", {"max_size": 1e6}, "types"),
        ("decoder", {"types": ["fp16"]}, "fp16"),
        ("decoder", {"max_decode_ms": 0.0}, "max_decode_ms"),
    ):
        with expect_error(InputError, name=name):
            mptk.advise(str(laboratory.open_model(kind)), data=str(laboratory.open_data()), **ASKED, **more)
    with expect_error(InputError, nearest=(70,)):
        mptk.advise(make_llama(), data=torch.zeros(4, 32).long(), max_decode_ms=1.0, measure=True, **ASKED)


# ---- what meets a limit ----


def make_way(type_: str, sparsity: float, ms: float, size: float, change: float) -> Way:
    figures = Figures(1.0, change, None, change, 0.01)
    return Way(type_, sparsity, {"ffn": round(100 * (1 - sparsity))}, size, {"decode": ms}, {"a": figures})


WAYS = (
    make_way(FLOAT_TYPE, 0.0, 32, 500, 0.0),
    make_way(FLOAT_TYPE, 0.2, 29, 400, 0.5),
    make_way("int8", 0.0, 10, 150, 0.01),
    make_way("int8", 0.2, 9, 130, 0.51),
    make_way("int4", 0.0, 9.5, 100, 0.07),
    make_way("int4", 0.2, 8, 90, 0.6),
)


def make_advice(limits: Ceiling) -> Advice:
    point = Point({"ffn": 100}, 0.0, 1e6, 4e6, None, {"a": Figures(1.0, 0.0, 1.0, 0.0, 0.0)})
    return Advice("m", "", "perplexity", 0.1, point, (point,), {}, {}, ways=WAYS, limits=limits)


@pytest.mark.parametrize(
    ("limits", "best", "further"),
    [
        (Ceiling(decode_ms=40), (FLOAT_TYPE, 0.0), ("int8", 0.0)),
        (Ceiling(decode_ms=20), ("int8", 0.0), ("int4", 0.0)),
        (Ceiling(decode_ms=9.2), ("int8", 0.2), ("int4", 0.2)),
        (Ceiling(decode_ms=20, bytes=120), ("int4", 0.0), ("int8", 0.2)),
        (Ceiling(bytes=95), ("int4", 0.2), None),
        (Ceiling(decode_ms=1), None, None),
    ],
)
def test_the_best_way_is_the_one_that_loses_least_within_the_limits(limits, best, further):
    found = make_advice(limits)
    way, after = found.find_way(), found.cheaper_way
    assert (None if way is None else (way.type, way.sparsity)) == best
    assert (None if after is None else (after.type, after.sparsity)) == further
    said = " ".join(describe_ways(found))
    assert ("The next cheaper way: " in said) == (further is not None)
    assert ("No cut is needed" in said) == (best is not None and not best[1])
    assert ("No way that was measured meets 1 ms of decode" in said) == (best is None)


def test_better_ways_that_seem_a_little_too_slow_are_made_with_the_best():
    """Int8 at 10 ms and int4 at 9.5 are better than the best way that is predicted within 9.2 ms; float32 is far off."""
    found = make_advice(Ceiling(decode_ms=9.2))
    first, *others = choose_further_ways(found)
    assert first == WAYS[3]
    assert (WAYS[2] in others, WAYS[4] in others, WAYS[0] in others) == (True, True, False)
    quick = [replace(way, measured=replace(way, ms={"decode": 0.9 * way.ms["decode"]})) for way in WAYS]
    made = replace(found, ways=(*WAYS[:2], *quick[2:5], WAYS[5]))
    assert choose_further_ways(made) == []
    assert made.find_way().measured is not None
    assert (made.find_way().type, made.find_way().sparsity) == ("int8", 0.0)


def test_sizes_are_known_so_none_above_the_limit_is_made():
    assert WAYS[4] not in choose_further_ways(make_advice(Ceiling(bytes=95)))


def test_measured_figures_count_more_than_predicted_ones():
    int8, int4 = WAYS[2], WAYS[4]
    slower = replace(int8, measured=replace(int8, ms={"decode": 11.0}))
    found = replace(make_advice(Ceiling(decode_ms=10.5)), ways=(slower, int4))
    assert found.find_way() == int4
    better = {"a": Figures(1.0, -0.01, None, -0.01, 0.01)}
    found = replace(found, ways=(int8, replace(int4, measured=replace(int4, texts=better))))
    assert found.find_way().type == "int4"


def test_what_the_next_steps_would_buy_and_cost():
    found = make_advice(Ceiling(decode_ms=9.2))
    assert (found.better_way, found.cheaper_way) == (WAYS[4], WAYS[5])
    said = " ".join(describe_ways(found))
    assert (
        "int4, 20.0% removed takes 11% less (8.00 ms of decode, 0.0 MB), and costs +60.0% on a in place of +51.0%"
        in said
    )
    assert (
        "int4, nothing removed takes 6% more (9.50 ms of decode, 0.0 MB), and costs +7.0% on a in place of +51.0%"
        in said
    )
    assert make_advice(Ceiling(decode_ms=40)).better_way is None


def test_a_cut_that_seems_better_than_its_type_is_so_by_chance_and_one_that_a_type_beats_is_not_on_the_front():
    lucky = make_way("int8", 0.1, 9.5, 140, -0.01)
    found = replace(make_advice(Ceiling(decode_ms=20)), ways=(*WAYS, lucky))
    assert found.find_way() == WAYS[2]
    assert replace(found, limits=Ceiling(decode_ms=9.8)).find_way() == lucky
    front = [(way.type, way.sparsity) for way in make_advice(Ceiling()).front]
    assert front == [(FLOAT_TYPE, 0.0), ("int8", 0.0), ("int4", 0.0), ("int8", 0.2), ("int4", 0.2)]


@pytest.mark.usefixtures("made_up_times")
def test_the_command_names_the_way_and_how_to_make_it(laboratory, tmp_path, go_to):
    go_to(tmp_path)
    model, data = str(laboratory.open_model()), str(laboratory.open_data())
    typed = f"--data {data} --samples 8 --length 32 --align 8 --eval-windows 4 --sparsities 20%,40%".split()
    limit = ["--max-decode-ms", "1e6", "--measure"]
    run = done("advise", model, *typed, *limit, "--json", "a.json", "--html", "a.html", "-q")
    *said, command = run.stdout.strip().splitlines()
    assert "Round or cut" in " ".join(said)
    page = Path("a.html").read_text()
    shown = ("Round or cut", "decode, ms", "size, MB", "dense float32", "dense int8", "dense int4")
    assert all(word in page for word in shown)
    way = json.loads(Path("a.json").read_text())["way"]
    assert way["measured"]["ms"]["decode"] > 0
    assert shlex.split(command)[:3] == ["mptk", "prune" if way["sparsity"] else "export", model]
    done(*shlex.split(command)[1:], "-q")
    # A smaller size than the dense graph of int4 has: only a cut meets it.
    dense = min(way["bytes"] for way in json.loads(Path("a.json").read_text())["ways"] if not way["sparsity"])
    run = done("advise", model, *typed, "--max-size", f"{(dense - 1) / 1000:.3f}KB", "-q")
    assert shlex.split(run.stdout.strip().splitlines()[-1])[1] == "prune"
