"""The parts of learning: losses, the teacher's cache, the closed-form reconstruction, the work folder, the loop's order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from mptk import Samples, analyze, testing, trace
from mptk.config import Learning, LossWeights
from mptk.errors import OutputError
from mptk.ir import make_token_samples, resolve_plan
from mptk.methods.maskprune.learner import recompute
from mptk.methods.maskprune.losses import CHUNK, TopLogits, compute_class_losses, compute_hidden_error, shorten_logits
from mptk.methods.maskprune.teacher import CachedTeacher, Output, hash_model_weights
from mptk.methods.maskprune.train import schedule
from mptk.methods.reconstruct import _Fit, reconstruct_consumers
from mptk.protocols import RunFolder
from mptk.staged.staged import EXECUTOR, Executor
from mptk.testing import draw_plan, expect_error
from passes.transforms.insert_masks import find_mask_sites
from passes.transforms.masked_reference import mask


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def divergence(student: torch.Tensor, teacher: torch.Tensor | TopLogits) -> torch.Tensor:
    ids = torch.zeros(student.shape[:2], dtype=torch.long)
    return compute_class_losses(student, ids, teacher, LossWeights(lm=0.0))["loss"]


SHAPES = [(2, 5, 11), (2, 5, CHUNK // 4), (1, 2, CHUNK + 3)]
"""Logits of ten positions in one chunk, in chunks of four positions, and of two in chunks of one."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [LossWeights(lm=0.0), LossWeights(kl=0.0), LossWeights(lm=0.3, kl=1.7)])
def test_losses_and_their_gradient_are_torchs_whatever_the_chunks(shape, weights):
    student, teacher = logits(0, *shape).requires_grad_(), logits(1, *shape) + 300
    ids = torch.randint(11, shape[:2], generator=torch.Generator().manual_seed(2))
    lm = cross_entropy(student[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    kl = kl_div(log_softmax(student, -1), log_softmax(teacher, -1), log_target=True, reduction="none").sum(-1).mean()
    (expected,) = torch.autograd.grad(3 * (weights.lm * lm + weights.kl * kl), student)
    found = compute_class_losses(student, make_token_samples(ids).targets, teacher, weights)
    (seen,) = torch.autograd.grad(3 * found["loss"], student)
    # Torch's own sums in float32 lose digits over a million logits.
    assert found["loss"].item() == pytest.approx((weights.lm * lm + weights.kl * kl).item(), rel=1e-4)
    parts = {name: value.item() for name, value in (("lm", lm), ("kl", kl)) if getattr(weights, name)}
    assert {name: value.item() for name, value in found.items() if name != "loss"} == pytest.approx(parts, rel=1e-4)
    torch.testing.assert_close(seen, expected, rtol=1e-3, atol=min(1e-6, 1e-3 / shape[-1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_have_the_losses_and_the_gradient_of_the_same_numbers_in_float32(dtype):
    """The loss is scaled after it, as float16 needs: by then no part of its gradient may be 0."""
    shape, scale = SHAPES[1], 2.0**16
    student, teacher = logits(0, *shape).to(dtype).requires_grad_(), logits(1, *shape).to(dtype)
    wide = student.detach().float().requires_grad_()
    ids, weights = torch.randint(11, shape[:2], generator=torch.Generator().manual_seed(2)), LossWeights()
    expected = compute_class_losses(wide, ids, teacher.float(), weights)["loss"]
    found = compute_class_losses(student, ids, teacher, weights)["loss"]
    assert found.item() == expected.item()
    (seen,), (right,) = torch.autograd.grad(scale * found, student), torch.autograd.grad(scale * expected, wide)
    torch.testing.assert_close(seen, right.to(dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_under_a_shortened_teacher_is_that_of_the_formula(shape):
    student, short = logits(0, *shape).requires_grad_(), shorten_logits(logits(1, *shape), 3)
    logs = log_softmax(student, -1)
    top = logs.gather(-1, short.tokens)
    others = torch.log1p(-top.exp().sum(-1))
    kl = (short.logs.exp() * (short.logs - top)).sum(-1) + short.rest.exp() * (short.rest - others)
    (expected,) = torch.autograd.grad(kl.mean(), student)
    found = divergence(student, short)
    assert found.item() == pytest.approx(kl.mean().item(), rel=1e-4, abs=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, student)[0], expected, rtol=1e-3, atol=1e-6)


def test_a_shortened_teacher_bounds_the_divergence_from_below_and_reaches_it():
    student, teacher = logits(0, 2, 5, 40), logits(1, 2, 5, 40)
    full = divergence(student, teacher).item()
    values = [divergence(student, shorten_logits(teacher, k)).item() for k in (1, 5, 20, 39)]
    assert values == sorted(values)
    assert 0 < values[0] < values[2] <= full + 1e-6
    assert values[-1] == pytest.approx(full, rel=1e-4)
    assert divergence(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)


def test_hidden_error_is_relative_to_the_teachers_spread():
    h = logits(0, 2, 3, 7)
    assert compute_hidden_error([h], [h]).item() == 0
    mean = h.mean((0, 1)).expand_as(h)
    assert compute_hidden_error([mean, h], [h, h]).item() == pytest.approx(0.5)
    assert compute_hidden_error([100 * mean], [100 * h]).item() == pytest.approx(1.0)
    near, narrow = (1.01 * h).bfloat16(), h.bfloat16()
    expected = compute_hidden_error([near.float()], [narrow.float()]).item()
    assert compute_hidden_error([near], [narrow]).item() == pytest.approx(expected, rel=1e-6)


class Live:
    """The dense model as a teacher, and how many windows it was asked for, each time."""

    def __init__(self) -> None:
        self.model, self.calls = testing.make_decoder("llama"), list[int]()

    @torch.no_grad()
    def __call__(self, samples: Samples) -> Output:
        self.calls.append(len(samples))
        return self.model(*samples.tensors, use_cache=False).logits, None


def test_the_cache_gives_what_the_live_teacher_gave_and_asks_it_once(tmp_path):
    live, windows = Live(), make_token_samples(testing.draw_tokens(6, 9))
    student = logits(0, 2, 9, 97)
    exact = divergence(student, live(windows[torch.tensor([4, 1])])[0]).item()
    live.calls.clear()
    for rows in ([4, 1], [1, 4]):
        seen, states = CachedTeacher(live, tmp_path, k=96)(windows[torch.tensor(rows)])
        assert divergence(student.flip(0) if rows[0] == 1 else student, seen).item() == pytest.approx(exact, rel=2e-3)
        assert states is None
    assert live.calls == [2]
    CachedTeacher(live, tmp_path, k=96)(windows[1:3])  # in one batch whatever is there, for the same bits
    CachedTeacher(live, tmp_path, k=8)(windows[1:2])
    assert live.calls == [2, 2, 1]


def test_a_process_that_has_all_windows_runs_the_dense_model_if_another_needs_it(tmp_path):
    """As when it is in shards; else the other would wait for ever."""
    live, windows = Live(), make_token_samples(testing.draw_tokens(2, 9))
    for asked in (True, True, False):
        CachedTeacher(live, tmp_path, wanted=lambda missing, asked=asked: asked)(windows)
    assert live.calls == [2, 2]


def test_a_fingerprint_tells_models_apart():
    one, other = testing.make_decoder("llama"), testing.make_decoder("llama")
    assert hash_model_weights(one) == hash_model_weights(other)
    with torch.no_grad():
        next(other.parameters())[1, 2] += 1e-3
    assert hash_model_weights(one) != hash_model_weights(other)


@pytest.mark.parametrize(
    ("architecture", "executor"),
    [("llama", Executor(stage=9_000, borders=0)), ("phi3", EXECUTOR), ("gpt2", EXECUTOR), ("opt", EXECUTOR)],
)
def test_what_is_left_takes_over_for_a_removed_copy_of_it(architecture, executor):
    """If every removed unit is the double of a kept one, nothing need be lost; much text, for a small ridge."""
    model, ids = testing.make_decoder(architecture), testing.draw_tokens(200, 40)
    analysis = analyze(trace(model, dynamic=True))
    plan = draw_plan(analysis, ["ffn"], share=0.5)
    state = dict(model.named_parameters())
    for group in analysis.family("ffn").groups:
        kept = list(plan.families["ffn"].keep[group.layer][0])
        removed = [u for u in range(group.size) if u not in kept]
        for member in (m for m in group.members if m.role != "consumer"):
            at = torch.from_numpy(group.positions(member)[0])
            rows = state[member.weight].data.movedim(member.dim, 0)
            rows[at[removed].flatten()] = rows[at[kept][: len(removed)].flatten()]
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        sites = find_mask_sites(analysis, model, ["ffn"])
        cut = resolve_plan(analysis, plan)
        masked = mask(analysis, cut)(ids)
        fitted = reconstruct_consumers(analysis, sites, cut, {}, make_token_samples(ids), executor=executor)
        found = mask(replace(analysis, program=analysis.program.with_state(fitted)), cut)(ids)
    assert (found - dense).norm() < 0.1 * (masked - dense).norm()
    assert set(fitted) == {m.weight for g in analysis.family("ffn").groups for m in g.members if m.role == "consumer"}


def draw(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def fit(x: torch.Tensor, dense: torch.Tensor, keep: torch.Tensor, *, few: bool = False) -> torch.Tensor:
    """The dense weights of a layer that reads ``x``, fitted to the inputs that stay."""
    found = _Fit(keep, transposed=False, few=few)
    for rows in x.chunk(3):
        found.add(rows)
    return found.solve(dense, dense * 1.1)


def test_few_rows_give_the_same_fit_as_their_products():
    dense, x = draw((11, 17), (5, 17))
    keep = torch.arange(17) % 3 > 0
    found = [fit(x, dense, keep, few=few) for few in (True, False)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert not found[0][:, ~keep].any()


def test_one_huge_input_does_not_keep_a_layer_from_being_fitted():
    """As where a model makes its massive activations: the ridge follows the other inputs."""
    x, dense = draw((400, 6), (11, 6))
    x[:, 5], x[0, 0] = x[:, 4], 3000.0  # the last is a copy, and goes
    left = x[1:] @ (fit(x, dense, torch.arange(6) < 5) - dense).T
    assert left.norm() < 0.3 * (x[1:, 5:] @ dense[:, 5:].T).norm()


def test_more_text_lets_a_fit_go_further_from_the_dense_weights():
    x, dense = draw((40, 6), (11, 6))
    x[:, 5] = x[:, 4]  # the last goes, and its copy can make up for it
    more, less = ((x @ (fit(x.repeat(n, 1), dense, torch.arange(6) < 5) - dense).T).norm() for n in (100, 1))
    assert more < 0.1 * less


def test_activations_computed_again_change_no_gradient():
    ids, found = testing.draw_tokens(), []
    for again in (False, True):
        model, calls = testing.make_decoder("llama"), list[int]()
        recompute(model, again)
        for block in model.model.layers:
            block.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append((len(calls), [p.grad for p in model.parameters()]))
    (once, expected), (twice, gradients) = found
    assert (once, twice) == (testing.decoders.LAYER_COUNT, 2 * testing.decoders.LAYER_COUNT)
    torch.testing.assert_close(gradients, expected)


def test_the_rate_rises_and_falls_to_nothing():
    rates = [schedule(step, 100, 0.05) for step in range(100)]
    assert (rates[0], max(rates)) == (pytest.approx(0.2), 1.0)
    assert rates[-1] < 0.001


def test_a_work_folder_is_kept_apart_from_other_settings(tmp_path):
    out = tmp_path / "out"
    work = RunFolder(out, {"steps": 3}, resume=False)
    for step in (1, 2, 3):
        work.save_checkpoint("masks", step, {"x": torch.tensor(float(step))})
        work.log("masks", step, {"loss": 0.5})
    assert len(list(work.path.glob("masks-*.safetensors"))) == 2
    for steps, resume in ((3, False), (4, True)):
        with expect_error(OutputError, name=work.path):
            RunFolder(out, {"steps": steps}, resume=resume)
    again = RunFolder(out, {"steps": 3}, resume=True)
    step, state = again.read_latest("masks")
    assert (step, state["x"].item()) == (3, 3.0)
    again.drop_metrics("masks", 2)
    assert len((again.path / "metrics.jsonl").read_text().splitlines()) == 2


def test_masks_take_eight_steps_of_many_a_tenth_and_of_few_two_fifths():
    assert [Learning(steps=n).mask_steps for n in (3, 12, 20, 80, 200)] == [2, 5, 8, 8, 8]
    assert Learning(steps=12, mask_share=0.5).mask_steps == 6
