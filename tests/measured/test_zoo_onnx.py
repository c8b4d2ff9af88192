"""The zoo's ONNX sweep: a row that is equal, one that is not, one without a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import zoo_onnx
from mptk.ir import Program


def test_equal_row_says_what_was_cut_and_folded():
    row = zoo_onnx.run_type("causal-lm", "codegen")  # its config names no padding token
    assert row["stage"] == "equal", row["reason"]
    assert row["folded"] == row["layers"] > 1
    assert row["families"] >= 2
    assert row["difference"] <= zoo_onnx.TOLERANCE


def test_a_wrong_token_is_caught(inside):
    """One logit of one row in the last decoding step is off."""

    def wrong(outputs: list[Tensor]) -> list[Tensor]:
        outputs[-1][1, 0, 5] += 0.01 * outputs[-1].abs().max()
        return outputs

    inside.spoil("benchmarks.zoo_onnx.in_runtime", wrong)
    row = zoo_onnx.run_type("causal-lm", "llama")
    assert row["stage"] == "run"
    assert row["reason"].startswith("ONNX Runtime differs from torch by")


def test_recurrent_model_gives_the_reason_of_the_exporter():
    row = zoo_onnx.run_type("causal-lm", "mamba")
    assert row["stage"] == "build"
    assert "only if every layer caches its keys and values" in row["reason"]


def test_padding_that_only_the_traced_step_sees_is_a_fault(inside):
    """A step that takes padding for tokens; the model itself does not."""

    def blind(right: Callable[..., list[Tensor]], run: object, *args: object) -> list[Tensor]:
        def step(ids: Tensor, mask: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            return run(ids, mask * 0 + 1, *rest)  # type: ignore[operator]

        return right(step if isinstance(run, Program) else run, *args)

    inside.around("benchmarks.zoo_onnx.in_torch", blind)
    row = zoo_onnx.run_type("causal-lm", "llama")
    assert row["stage"] == "build"
    assert row["reason"].startswith("padding changes the logits of the traced step")
