"""Element-wise ops: whether they keep zeros, and that their operands share axes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from rule_cases import Case, both, none
from torch import Tensor

aten = torch.ops.aten

# f(0) = 0: chains of ops.
KEEP = (
    "tanh silu sin gelu erf relu",
    "tanh_ silu_ asinh gelu_ atan relu_",
    "mish leaky_relu elu selu celu abs",
    "leaky_relu_ hardswish absolute hardtanh square relu6",
    "neg hardswish_ negative hardtanh_ neg_ absolute relu6_",
    "sinh expm1 tan nan_to_num sign",
    "hardshrink softshrink",
    "round",
    "floor",
    "trunc",
)
DROP = "exp cos sigmoid softplus log_sigmoid special_expm1"


def chain(*names: str) -> Callable[[Tensor], Tensor]:
    """One op after the other, each on numbers of moderate size."""

    def function(x: Tensor) -> Tensor:
        for name in names:
            x = getattr(aten, name)(x * 1.5)
            if name in ("square", "sinh", "expm1", "tan"):
                x = x.tanh()
        return x

    return function


def call(name: str) -> Callable[..., Tensor]:
    """A call of that ATen op on a fresh tensor (so that an in-place op does not write on a linear layer's result)."""
    return lambda x, *others: getattr(aten, name)(x * 1.5, *others)  # type: ignore[no-any-return]


ONE = {names: Case(chain(*names.split())) for names in KEEP}
ONE |= {name: Case(call(name), summed=()) for name in DROP.split()}
ONE |= {
    "sqrt": Case(lambda x: x.abs().sqrt()),
    "log1p": Case(lambda x: x.abs().log1p()),
    "log": Case(lambda x: (x.abs() + 1).log(), summed=()),
    "fake_quantize": Case(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.01, 3, -128, 127)),
    "fake_quantize_of_tensors": Case(
        lambda x: torch.fake_quantize_per_tensor_affine(x, torch.tensor([0.01]), torch.tensor([3]), -128, 127),
        summed=(),
    ),
    "hardtanh_shifted": Case(lambda x: F.hardtanh(x, 0.5, 2.0), summed=()),
    "elu_scaled": Case(lambda x: F.elu(x, 0.3)),
    "prelu": Case(lambda x, w: F.prelu(x, w), shapes=[(1,)]),
    "prelu_channel": Case(lambda x, w: F.prelu(x.flatten(0, 1), w), shapes=[(6,)]),
    "_prelu_kernel": Case(lambda x, w: aten._prelu_kernel(x, w), shapes=[(6,)]),
}
NUMBERS = {
    "add_zero": Case(lambda x: x + 0),
    "add_one": Case(lambda x: x + 1, summed=()),
    "sub_one": Case(lambda x: x - 1, summed=()),
    "rsub": Case(lambda x: 1 - x, summed=()),
    "mul_number": Case(lambda x: x * 3),
    "div_number": Case(lambda x: x / 3),
    "pow_2": Case(lambda x: x**2),
    "pow_": Case(lambda x: (x * 1).pow_(2)),
    "pow_half": Case(lambda x: x.abs() ** 0.5),
    "pow_negative": Case(lambda x: (x.abs() + 1) ** -1, summed=()),
    "pow_0": Case(lambda x: x**0, linear=(6,), summed=()),
    "pow_base": Case(lambda x: 2**x, summed=()),
    "floor_divide": Case(lambda x: x * 5 // 2, summed=()),
    "remainder": Case(lambda x: x % 0.7, summed=()),
    "fmod": Case(lambda x: x.fmod(0.7)),
    "clamp": Case(lambda x: x.clamp(-0.3, 0.4)),
    "clamp_": Case(lambda x: (x * 1).clamp_(-0.3, 0.4)),
    "clamp_above": Case(lambda x: x.clamp(0.1, 0.4), summed=()),
    "clamp_min": Case(lambda x: aten.clamp_min(x, 0.1), summed=()),
    "clamp_max": Case(lambda x: aten.clamp_max(x, -0.1), summed=()),
    "atan2_behind": Case(lambda x: torch.atan2(x, torch.full((6,), -1.0)), summed=()),
    "arctan2": Case(lambda x, y: torch.arctan2(x, y.abs() + 1), widths=(6, 6), summed=()),
    "where_scalar_self": Case(lambda x: torch.where(x > 0, 0.0, x)),
    "where_scalar_self_one": Case(lambda x: torch.where(x > 0, 1.0, x), summed=()),
    "where_other": Case(lambda x: aten.where.ScalarOther(x > 0, x, 0.0)),
    "where_other_1": Case(lambda x: aten.where.ScalarOther(x > 0, x, 1.0), summed=()),
    "where_scalars": Case(lambda x: aten.where.Scalar(x > 0, 2.0, 0.0), summed=()),
    "masked_fill": Case(lambda x: x.masked_fill(x > 0.3, 0.0)),
    "masked_fill_": Case(lambda x: (x * 1).masked_fill_(x > 0.3, 0.0)),
    "masked_fill_1": Case(lambda x: x.masked_fill(x > 0.3, 1.0), summed=()),
    "compare": Case(lambda x: (x > 0.1).float() * (x <= 2) + (x != 0.5), summed=()),
    "comparisons": Case(
        lambda x, y: (
            torch.greater(x, y) * torch.less(x, 2)
            + torch.greater_equal(x, y) * torch.less_equal(x, 3)
            + torch.not_equal(x, y) * torch.isclose(x, y)
        ),
        widths=(6, 6),
        summed=(),
    ),
}
TWO = (6, 6)
PAIRS = {
    "add": Case(lambda x, y: x + y, widths=TWO),
    "add_": Case(lambda x, y: (x * 1).add_(y), widths=TWO),
    "add_exp": Case(lambda x, y: x + y.exp(), widths=TWO, summed=()),
    "add_weight": Case(lambda x, w: x + w, shapes=[(6,)]),
    "sub": Case(lambda x, y: x - y, widths=TWO),
    "sub_": Case(lambda x, y: (x * 1).sub_(y), widths=TWO),
    "subtract": Case(lambda x, y: torch.subtract(x, y), widths=TWO),
    "mul": Case(lambda x, y: x * y.exp(), widths=TWO),
    "mul_": Case(lambda x, y: (x * 1).mul_(y), widths=TWO),
    "multiply": Case(lambda x, y: torch.multiply(x, y), widths=TWO),
    "div": Case(lambda x, y: x / y.exp(), widths=TWO),
    "div_": Case(lambda x, y: (x * 1).div_(y.exp()), widths=TWO),
    "div_both": none(lambda x, y: x / y, TWO),
    "reciprocal": none(lambda x: x.reciprocal() + x.abs().rsqrt() + x**-1),
    "infinite": none(lambda x: (x.tanh().abs() * 0.9).logit() + x.abs().digamma()),
    "infinite_": none(lambda x: aten.pow_(x * 1, -2) + x.abs().lgamma()),
    "logical_not": Case(lambda x: torch.logical_not(x > 0.1), summed=()),
    "divide": Case(lambda x, y: torch.divide(x, y.exp()), widths=TWO),
    "true_divide": Case(lambda x, y: torch.true_divide(x, y.exp()), widths=TWO),
    "maximum": Case(lambda x, y: torch.maximum(x, y) + torch.minimum(x, y * 2), widths=TWO),
    "maximum_exp": Case(lambda x, y: torch.maximum(x, y.exp()), widths=TWO, summed=()),
    "where": Case(lambda x, y: torch.where(x > 0, x, y), widths=TWO),
    "where_exp": Case(lambda x, y: torch.where(x > 0, x, y.exp()), widths=TWO, summed=()),
    "addcmul": Case(lambda x, y: torch.addcmul(x, x, y), widths=TWO),
    "addcmul_exp": Case(lambda x, y: torch.addcmul(x.exp(), x, y), widths=TWO, summed=()),
    "lerp": Case(lambda x, y: torch.lerp(x, y, 0.3), widths=TWO),
    "lerp_exp": Case(lambda x, y: torch.lerp(x.exp(), y, 0.3), widths=TWO, summed=()),
    "logical_and": Case(lambda x, y: torch.logical_and(x > 0, y > 0), widths=TWO, summed=()),
    "logical_or": Case(lambda x, y: torch.logical_or(x > 0, y > 0), widths=TWO, summed=()),
    "bits": Case(lambda x, y: ((x > 0) & (y > 0)) | (x > 1), widths=TWO, summed=()),
    "bitwise": Case(
        lambda x, y: torch.bitwise_or(torch.bitwise_and(x > 0, y > 0), torch.bitwise_not(y > 1)), widths=TWO, summed=()
    ),
    "copy_": Case(lambda x, y: (x * 1).copy_(y) + x, widths=TWO),
    "copy": Case(lambda x, y: aten.copy(x, y) + x, widths=TWO),
    "glu": Case(lambda x: F.glu(x), widths=(12,)),
    "glu_dim": Case(lambda x: F.glu(x.transpose(1, 2), 1).transpose(1, 2), widths=(12,)),
    "glu_exp": Case(lambda x: F.glu(x.exp()), widths=(12,), summed=()),
    "glu_joined": Case(lambda x, y: F.glu(torch.cat((x, y), -1)), widths=TWO),
    "glu_joined_exp": Case(lambda x, y: F.glu(torch.cat((x.exp(), y), -1)), widths=TWO, summed=()),
    "glu_heads": both(lambda x: F.glu(x.view(2, 5, 4, 6), dim=2).flatten(2), (2, 6), (24,)),
    "glu_inside": none(lambda x: F.glu(x.view(2, 5, 3, 8).relu().flatten(2)), (24,)),
    "glu_elsewhere": Case(lambda x: F.glu(x[:, :4], 1)),
    "outer": both(lambda x, y: x.unsqueeze(-1) * y.unsqueeze(-2), (4, 6), (6, 4)),
    "outer_sum": Case(lambda x: x.unsqueeze(-1) + x.unsqueeze(-2), summed=()),
    "outer_product": Case(lambda x: x.unsqueeze(-1) * x.exp().unsqueeze(-2), summed=()),
    "outer_expanded": Case(lambda x: x.unsqueeze(-2).expand(-1, -1, 6, -1) + x.unsqueeze(-1) * 0, summed=()),
}

GROUPS = {"one operand": ONE, "an operand and a number": NUMBERS, "two operands of one family": PAIRS}
