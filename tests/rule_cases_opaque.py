"""Complex numbers, and ops that keep no axes apart: nothing around these can be cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rule_cases import Case
from torch import Tensor

aten, fft, linalg = torch.ops.aten, torch.fft, torch.linalg


def pairs(x: Tensor) -> Tensor:
    """[2, 5, 12] → complex [2, 5, 2, 3]."""
    return torch.view_as_complex(x.view(2, 5, 2, 3, 2))


def real(z: Tensor) -> Tensor:
    return torch.view_as_real(z).reshape(2, 5, -1)


TURN = {"linear": (2, 3), "summed": (2, 3), "widths": (12,)}
COMPLEX: dict[str, Case] = {
    "rotated": Case(
        lambda x: real(pairs(x) * torch.polar(torch.ones(5, 1, 3), torch.arange(15.0).view(5, 1, 3))), **TURN
    ),
    "polar": Case(lambda x, y: real(torch.polar(x, y)), widths=(6, 6)),
    "complex": Case(lambda x, y: real(torch.complex(x, y)), widths=(6, 6)),
    "complex_exp": Case(lambda x, y: real(torch.complex(x, y.exp())), widths=(6, 6), summed=()),
    "parts": Case(lambda x: (pairs(x).real + pairs(x).imag * 2 + pairs(x).conj().angle()).flatten(2), **TURN),
    "resolved": Case(lambda x: real(aten.resolve_neg(aten.resolve_conj(pairs(x).conj()))), **TURN),
}


def square(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """Apply ``function`` to [2, 5, 3, 3] matrices that can be inverted."""
    return lambda x: function(x.view(2, 5, 3, 3) + 9 * torch.eye(3)).reshape(2, 5, -1)


def opaque(function: Callable[[Tensor], Tensor], width: int = 6) -> Case:
    return Case(function, linear=(), summed=(), widths=(width,))


FOURIER = ["fft", "ifft", "rfft", "irfft", "fft2", "ifft2", "rfft2", "irfft2", "fftn", "ifftn", "rfftn", "irfftn"]


def magnitude(name: str) -> Callable[[Tensor], Tensor]:
    return lambda x: getattr(fft, name)(x).abs()  # type: ignore[no-any-return]


# A linear layer after them still has its own columns: frozen too, since they are the op's result.
OPAQUE: dict[str, Case] = {
    **{name: opaque(magnitude(name)) for name in FOURIER},
    "stft": opaque(
        lambda x: torch.stft(x.flatten(1), 8, 4, window=torch.ones(8), return_complex=True).abs().view(2, 5, -1)
    ),
    "istft": opaque(
        lambda x: torch.istft(x.view(2, 5, 6).to(torch.complex64), 8, window=torch.ones(8))[:, :10].reshape(2, 5, 2)
    ),
    "im2col": opaque(lambda x: torch.nn.functional.unfold(x.view(2, 5, 4, 6), 2).reshape(2, 5, -1), 24),
    "col2im": opaque(lambda x: torch.nn.functional.fold(x.reshape(2, 20, 6), (3, 4), 2), 24),
    "grid_sampler": opaque(
        lambda x: torch.nn.functional.grid_sample(
            x.view(2, 5, 4, 6), torch.zeros(2, 2, 3, 2), align_corners=False
        ).flatten(2),
        24,
    ),
    "max_unpool2d": opaque(
        lambda x: torch.nn.functional.max_unpool2d(
            *torch.nn.functional.max_pool2d(x.view(2, 5, 4, 6), 2, return_indices=True), 2
        ).flatten(2),
        24,
    ),
    "householder": opaque(lambda x: linalg.householder_product(x.mT, x[..., 0]).mT),
    "matrix_exp": opaque(square(lambda x: linalg.matrix_exp(x / 9) + torch.matrix_exp(x / 9)), 9),
    "multi_dot": opaque(lambda x: linalg.multi_dot([x[0].mT, x[0], x[1].mT]).expand(2, 6, 5).mT),
    "det": opaque(square(lambda x: (x.det() + linalg.det(x)).unsqueeze(-1)), 9),
    "pinverse": opaque(square(lambda x: linalg.pinv(x) + x[0, 0].pinverse()), 9),
    "as_strided": opaque(lambda x: x.as_strided((2, 5, 3), (30, 6, 2))),
    "diagflat": opaque(lambda x: x[0, 0].diagflat().expand(10, 6, 6).reshape(2, 5, 36)),
    "diagonal_scatter": opaque(lambda x: x.diagonal_scatter(x[:, :, 0], 0, 1, 2)[..., :5]),
    "repeats": opaque(
        lambda x: (
            torch.repeat_interleave((x[0, :, 0] * 0).long() + 1, output_size=5).float().expand(2, 5, 5) * x[..., :5]
        )
    ),
    "take": opaque(lambda x: x.take(torch.tensor([1, 7])).expand(2, 5, 2)),
    "median_all": opaque(lambda x: x * (x.median() + x.nanmedian())),
    "quantile": opaque(lambda x: x.quantile(0.3, -1, keepdim=True)),
    "native_group_norm": opaque(
        lambda x: torch.native_group_norm(x.view(2, 6, 5), None, None, 2, 6, 5, 3, 1e-5)[0].view(2, 5, 6)
    ),
    "native_batch_norm": opaque(lambda x: torch.native_batch_norm(x.mT, None, None, None, None, True, 0.1, 1e-5)[0].mT),
    "native_batch_norm_given": opaque(
        lambda x: (
            aten._native_batch_norm_legit_no_training(x.mT, None, None, torch.zeros(6), torch.ones(6), 0.1, 1e-5)[0].mT
        )
    ),
    "cdist": opaque(lambda x: torch.cdist(x, x + 1)),
    "inv": opaque(square(linalg.inv), 9),
    "solve": opaque(square(lambda x: linalg.solve(x, x + 1)), 9),
    "svd": opaque(square(lambda x: linalg.svd(x)[1]), 9),
    "qr": opaque(square(lambda x: linalg.qr(x)[1]), 9),
    "eigh": opaque(square(lambda x: linalg.eigh(x + x.mT)[0]), 9),
    "cross": opaque(lambda x: torch.cross(x.view(2, 5, 2, 3), 1 + x.view(2, 5, 2, 3), -1).flatten(2)),
    "linalg_cross": opaque(lambda x: linalg.cross(x.view(2, 5, 2, 3), 1 + x.view(2, 5, 2, 3)).flatten(2)),
    "trace": Case(lambda x, w: x * w.trace(), shapes=[(8, 9)]),
    "searchsorted": opaque(lambda x: torch.searchsorted(x, x * 1)),
    "bucketize": opaque(lambda x: torch.bucketize(x, torch.arange(3.0))),
    "kron": opaque(lambda x: torch.kron(x, torch.ones(1, 1, 2))),
    "tensordot": opaque(lambda x: torch.tensordot(x, torch.ones(6, 4), 1)),
}


def recurrent(name: str) -> Case:
    """A layer over the tokens from 6 to 4 channels."""
    gates = {"lstm": 4, "gru": 3}.get(name.split("_")[0], 1)
    shapes = [(4 * gates, 6), (4 * gates, 4), (4 * gates,), (4 * gates,)]
    whole: tuple[Any, ...] = (True, 1, 0.0, False, False, False)

    def layer(x: Tensor, *weights: Tensor) -> Tensor:
        hidden = [torch.zeros(1, 5, 4)] * 2 if name == "lstm" else torch.zeros(1, 5, 4)
        return getattr(aten, name).input(x, hidden, list(weights), *whole)[0]  # type: ignore[no-any-return]

    def cell(x: Tensor, *weights: Tensor) -> Tensor:
        hidden = [torch.zeros(10, 4)] * 2 if name == "lstm_cell" else torch.zeros(10, 4)
        result = getattr(aten, name)(x.flatten(0, 1), hidden, *weights)
        return (result[0] if name == "lstm_cell" else result).view(2, 5, 4)  # type: ignore[no-any-return]

    return Case(cell if name.endswith("_cell") else layer, (), (), shapes=shapes)


LAYERS = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
RECURRENT = {name: recurrent(name) for name in (*LAYERS, *(f"{layer}_cell" for layer in LAYERS))}
GROUPS = {"complex": COMPLEX, "opaque": OPAQUE, "recurrent": RECURRENT}
