"""What `mptk advise` measures, what it calls safe, and what the command and the page say.

It reaches for mptk.features.advise.advice, verdicts on made-up figures, and mptk.features.advise.sweep, which cuts are trained.
"""

from __future__ import annotations

import json
import math
import random
import shlex
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from commands import done
from transformers import LlamaForCausalLM

import mptk
from mptk.errors import DataError, InputError
from mptk.features.advise.advice import Advice, Figures, Point, Range, Recovery
from mptk.features.advise.sweep import to_train
from mptk.testing import MODEL_KINDS, WORDS, expect_error

FIT, MEASURED = 8, 4
ASKED = {"sparsities": [0.1, 0.3], "samples": FIT, "eval_windows": MEASURED, "length": 32, "align": 8}
FITTED = {"method": "wanda", "reconstruct": True, "onnx": False, "progress": None}


@pytest.fixture(scope="module")
def llama(laboratory):
    return str(laboratory.open_model())


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 60, (FIT + MEASURED, 32), generator=torch.Generator().manual_seed(1))


def losses(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of each window, and the top-1 predictions."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    each = [F.cross_entropy(row[:-1], target[1:]) for row, target in zip(logits, ids, strict=True)]
    return torch.stack(each).double(), logits.argmax(-1)


@pytest.mark.always
def test_a_point_is_what_prune_makes_of_its_widths(llama, ids, tmp_path):
    found = mptk.advise(llama, data=ids, families=("ffn",), progress=None, **ASKED)
    (text,) = found.texts
    point = found.division[-1]
    # Evaluation data, so that nothing is set aside of the others.
    asked = {**FITTED, "data": ids[:FIT], "eval_data": ids[FIT:], "samples": FIT, "length": 32, "align": 8}
    pruned = mptk.prune(llama, tmp_path / "cut", families=("ffn",), widths={"ffn": point.widths["ffn"]}, **asked)
    cut, own = losses(pruned.model, ids[FIT:])
    whole, dense = losses(LlamaForCausalLM.from_pretrained(llama), ids[FIT:])
    figures = point.texts[text]
    assert figures.loss == pytest.approx(float(cut.mean()), rel=1e-4)
    assert figures.change == pytest.approx(math.exp(float((cut - whole).mean())) - 1, rel=1e-3, abs=1e-6)
    assert figures.agreement == pytest.approx(float((own == dense).float().mean()), abs=1e-6)
    error = math.exp(float((cut - whole).mean())) * float((cut - whole).std()) / math.sqrt(MEASURED)
    assert figures.error == pytest.approx(error, rel=1e-2)
    assert point.sparsity == pytest.approx(pruned.report.sparsity)
    assert point.parameters == pruned.report.cost["pruned"]["parameters"]


def test_every_family_has_a_curve_and_every_layer_a_figure(llama, ids):
    found = mptk.advise(llama, data=ids, portable=False, progress=None, **ASKED)
    assert set(found.families) == {"kv_groups", "q_heads", "ffn", "layers"}
    for name, points in found.families.items():
        assert points
        for point in points:
            assert {family for family, width in point.widths.items() if width < found.dense.widths[family]} == {name}
    assert [point.sparsity for point in found.division] == sorted(point.sparsity for point in found.division)
    assert all(abs(p.sparsity - s) < 0.05 for p, s in zip(found.division, ASKED["sparsities"], strict=True))
    assert {name: len(rises) for name, rises in found.layers.items()} == {"kv_groups": 3, "q_heads": 3, "ffn": 3}


def test_the_division_cuts_what_costs_least(ids):
    """Half of the feed-forward units of each layer do nothing."""
    model = MODEL_KINDS["decoder"].make().eval()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, ::2] = 0
        layer.self_attn.o_proj.weight.data *= 20
    found = mptk.advise(model, data=ids, portable=False, progress=None, **{**ASKED, "sparsities": [0.28]})
    (point,) = found.division
    assert {name: point.widths[name] for name in ("kv_groups", "q_heads")} == {"kv_groups": 3, "q_heads": 2}
    assert point.widths["ffn"] <= 48
    assert max(map(abs, found.layers["ffn"])) < 1e-4, "each layer keeps the other half"


def test_each_text_is_measured_by_itself(llama, tmp_path):
    files = [tmp_path / "code.txt", tmp_path / "prose.txt"]
    for seed, file in enumerate(files):
        file.write_text(" ".join(random.Random(seed).choices(WORDS, k=900)))
    names = [*map(str, files)]
    both = mptk.advise(llama, data=",".join(names), progress=None, **ASKED)
    assert both.texts == names
    first, second = both.division[0].texts.values()
    assert first != second


def test_an_encoder_is_measured_on_single_texts(laboratory, tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(" ".join(WORDS[: 5 + i % 9]) for i in range(99)))
    found = mptk.advise(
        str(laboratory.open_model("encoder")),
        data=str(tmp_path / "lines.txt"),
        progress=None,
        **ASKED | {"sparsities": [0.2], "samples": 4},
    )
    assert "4 or more single texts of " in found.protocol


@pytest.fixture
def place(tmp_path, go_to):
    """The current folder, with ``prose.txt``."""
    go_to(tmp_path)
    (tmp_path / "prose.txt").write_text(" ".join(WORDS * 400))
    return tmp_path


TYPED = "--data prose.txt --samples 8 --length 32 --align 8 --eval-windows 4 --tolerance 900%"


# ---- what is safe ----


def figures(change: float, error: float = 0.0) -> Figures:
    return Figures(1 + math.log1p(change), math.log1p(change), 0.9, change, error)


def advice(*rows: tuple[float, dict[str, Figures]], tolerance: float = 0.1) -> Advice:
    texts = {text: Figures(1.0, 0.0, 1.0, 0.0, 0.0) for _, found in rows for text in found}
    points = [Point({"ffn": round(100 * (1 - s))}, s, 1e6 * (1 - s), 4e6 * (1 - s), None, found) for s, found in rows]
    dense = Point({"ffn": 100}, 0.0, 1e6, 4e6, None, texts)
    return Advice("m", "", "perplexity", tolerance, dense, tuple(points), {"ffn": tuple(points)}, {})


def test_an_advice_is_a_line_and_in_a_notebook_a_table_with_its_command():
    found = replace(advice((0.1, {"a": figures(0.01)}), (0.2, {"a": figures(0.4)})), command="mptk prune <m>")
    assert "10.0%" in repr(found)
    page = found._repr_html_()
    assert page.count("<tr>") == 3
    assert "<pre>mptk prune &lt;m&gt;</pre>" in page


def test_the_largest_cut_below_the_tolerance_is_safe_and_the_weakest_text_decides():
    """Changes count with two standard errors."""
    found = advice(
        (0.1, {"a": figures(0.01), "b": figures(0.02)}),
        (0.2, {"a": figures(0.05), "b": figures(0.2)}),
        (0.3, {"a": figures(0.3), "b": figures(0.09)}),  # below it again: the larger cut is luck
    )
    assert [found.find_safe(text).sparsity for text in "ab"] == [0.2, 0.1]
    assert found.recommended is found.division[0]
    rows = [(0.1, {"a": figures(0.06, 0.019)}), (0.2, {"a": figures(0.06, 0.021)})]
    assert advice(*rows).find_safe("a").sparsity == 0.1
    assert advice(rows[1]).find_safe("a") is None
    assert advice(rows[1]).recommended is None
    # The knee is below the chord.
    rises = {0.1: 0.01, 0.2: 0.03, 0.3: 0.06, 0.4: 0.6, 0.5: 1.5}
    assert advice(*((s, {"a": figures(rise)}) for s, rise in rises.items())).knee.sparsity == 0.3
    assert advice((0.1, {"a": figures(0.1)}), (0.2, {"a": figures(0.2)})).knee is None


def test_the_command_says_what_is_safe_and_how_to_cut(llama, place):
    typed = f"{TYPED} --sparsities 10%,0.3".split()
    run = done("advise", llama, *typed, "--html", "page.html", "--json", "a.json", "-q")
    *said, command = run.stdout.strip().splitlines()
    assert "Recommended: remove 29.5%" in " ".join(said)
    found = json.loads((place / "a.json").read_text())
    assert found["recommended"]["sparsity"] == pytest.approx(0.3, abs=0.05)
    page = (place / "page.html").read_text()
    assert page.count("<svg") >= 4
    assert "How far can" in page
    assert shlex.split(command)[:3] == ["mptk", "prune", llama]
    run = done(*shlex.split(command)[1:], "--no-onnx", "--eval-length", "32", "-q")
    assert mptk.Report.read("decoder-pruned").sparsity == pytest.approx(found["recommended"]["sparsity"])


@pytest.mark.parametrize(
    ("keywords", "kind", "name"),
    [
        ({"sparsities": []}, InputError, "sparsities"),
        ({"sparsities": [0.3, 1.0]}, InputError, "sparsities"),
        ({"tolerance": 0.0}, InputError, "tolerance"),
        ({"plan": "plan.json"}, InputError, "plan"),
        ({"larger": "runs/a"}, InputError, "larger"),
        ({"layers": "0-1", "target": "graph"}, InputError, "layers"),
        ({"families": ("ffn.1",), "target": "graph"}, InputError, "ffn.1"),
        ({"data": torch.ones(1, 32, dtype=torch.long)}, DataError, None),
    ],
)
def test_bad_arguments_are_refused(llama, ids, keywords, kind, name):
    with expect_error(kind, name=name):
        mptk.advise(llama, **{"data": ids, "progress": None, **ASKED, **keywords})


# ---- after training ----


def trained(found: Advice, *rows: tuple[float, dict[str, Figures]]) -> Advice:
    """The advice with cuts after training: sparsity → text → figures."""
    cuts = {point.sparsity: point for point in found.division}
    points = [replace(cuts[sparsity], texts=figures) for sparsity, figures in rows]
    return replace(found, recovery=Recovery(16, 8192, tuple(points)))


def nats(rise: float, error: float = 0.0) -> Figures:
    """Figures of a rise of the loss. ``error``: of the rise."""
    return Figures(1 + rise, rise, 0.9, math.expm1(rise), math.exp(rise) * error)


CUTS = [(s, {"a": nats(rise)}) for s, rise in {0.1: 0.1, 0.2: 0.2, 0.3: 0.4, 0.4: 0.8, 0.5: 1.6}.items()]


def test_other_cuts_lie_between_the_shares_of_trained_ones_and_their_line():
    found = trained(advice(*CUTS), (0.2, {"a": nats(0.1)}), (0.4, {"a": nats(0.6)}))
    shares = [found.compute_recovered(point, "a") for point in found.recovery.points]
    assert shares == pytest.approx([0.5, 0.25])
    after = {point.sparsity: found.estimate_after(point, "a") for point in found.division}
    rises = {s: (math.log1p(each.least), math.log1p(each.most)) for s, each in after.items()}
    assert rises[0.2] == pytest.approx((0.1, 0.1)), "measured"
    assert rises[0.3] == pytest.approx((0.4 * 0.5, 0.4 * 0.75)), "the line is between the shares, at 0.27"
    # The line is below them here, as training taught the text, and above them at the other end.
    assert rises[0.1] == pytest.approx((0.1 - 0.1 * 5 / 6, 0.1 * 0.75))
    assert rises[0.5] == pytest.approx((1.6 * 0.5, 0.6 + 0.8 * 5 / 6))
    # Training is not taken to make a cut worse.
    found = trained(advice(*CUTS), (0.4, {"a": nats(0.6)}), (0.5, {"a": nats(0.7)}))
    assert math.log1p(found.estimate_after(found.division[0], "a").most) == pytest.approx(0.1), "the line has 0.51"
    # A range has two standard errors.
    found = trained(advice((0.2, {"a": nats(0.4, 0.05)}), (0.4, {"a": nats(0.8)})), (0.4, {"a": nats(0.4)}))
    after = found.estimate_after(found.division[0], "a")
    assert [math.log1p(after.least), math.log1p(after.most)] == pytest.approx([0.2 - 0.1, 0.2 + 0.1])


def test_the_smallest_cut_that_is_not_safe_and_the_largest_are_trained():
    for tolerance, expected in ((math.expm1(0.25), [0.3, 0.5]), (math.expm1(0.05), [0.1, 0.5]), (10.0, [0.5])):
        assert [p.sparsity for p in to_train(advice(*CUTS, tolerance=tolerance))] == expected


def test_after_training_more_is_safe_and_the_most_decides():
    cuts = advice(*CUTS, tolerance=math.expm1(0.31))
    found = trained(cuts, (0.3, {"a": nats(0.3)}), (0.5, {"a": nats(0.8)}))
    assert cuts.recommended_after is None
    assert (found.recommended.sparsity, found.recommended_after.sparsity) == (0.2, 0.3)
    said = found.to_json()["recovery"]
    assert said["recommended"]["sparsity"] == 0.3
    least, most = math.expm1(0.8 * 0.5), math.expm1(0.8 * 0.75)
    assert said["after"]["a"][3] == pytest.approx({"least": least, "most": most})


def test_without_a_perplexity_shares_are_of_the_change():
    cuts = replace(advice((0.2, {"a": figures(0.2)}), (0.4, {"a": figures(0.4)})), measure="disagreement")
    found = trained(cuts, (0.4, {"a": figures(0.1)}))
    assert found.estimate_after(found.division[0], "a") == Range(pytest.approx(0.05), pytest.approx(0.05))
    noisy = trained(cuts, (0.4, {"a": figures(0.0, 0.1)}))
    assert noisy.estimate_after(found.division[1], "a") == Range(0.0, 0.2), "no share is below 0"


def test_a_module_of_no_class_is_not_trained():
    with expect_error(InputError, name="calibrate"):
        mptk.advise(torch.nn.Linear(4, 4), example_inputs=torch.ones(4, 4), calibrate=True, progress=None)


def test_a_trained_cut_is_what_prune_makes_with_these_steps(llama, tmp_path):
    ids = (torch.arange(22)[:, None] + torch.arange(32)) % 7 + 3  # which training learns
    how = {"families": ("ffn",), "samples": 8, "length": 32, "align": 8, "steps": 4, "batch": 4, "lr": 1e-2}
    found = mptk.advise(llama, sparsities=[0.3], data=ids, calibrate=True, eval_windows=4, progress=None, **how)
    (before,), (after,), (text,) = found.division, found.recovery.points, found.texts
    assert (found.recovery.steps, found.recovery.tokens) == (4, 4 * 4 * 32)
    asked = {**FITTED, **how, "data": ids[:18], "eval_data": ids[18:]}
    pruned = mptk.prune(llama, tmp_path / "cut", widths={"ffn": before.widths["ffn"]}, **asked)
    cut, _ = losses(pruned.model, ids[18:])
    assert after.texts[text].loss == pytest.approx(float(cut.mean()), rel=1e-4)
    assert after.texts[text].loss != pytest.approx(before.texts[text].loss, rel=1e-3)


def test_training_that_makes_a_cut_worse_is_dropped(llama, ids):
    how = {**ASKED, "sparsities": [0.3], "steps": 2, "batch": 2, "lr": 0.1}
    found = mptk.advise(llama, data=ids, families=("ffn",), calibrate=True, progress=None, **how)
    (before,), (after,), (text,) = found.division, found.recovery.points, found.texts
    assert after.texts[text].loss == pytest.approx(before.texts[text].loss, rel=1e-4)


def test_calibrate_says_its_cost_before_and_prints_two_commands(llama, place):
    typed = f"{TYPED} --sparsities 0.2,0.3".split()
    run = done("advise", llama, *typed, "--calibrate", "--steps", "2", "--html", "page.html")
    assert "8 calibration windows and 2 trainings of 2 steps on 512 tokens" in " ".join(run.stderr.split())
    *said, first, plain, second, trained = run.stdout.strip().splitlines()
    assert "after training" in " ".join(said)
    assert first == "The largest cut that is safe without training:"
    assert second == "The largest cut that is safe after a training of 2 steps:"
    assert "--steps 2" not in plain
    assert "--steps 2" in trained
    page = (place / "page.html").read_text()
    assert "Shaded: after training" in page
    assert page.index(first) < page.index(second)
