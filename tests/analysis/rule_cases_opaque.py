"""Complex numbers, and ops that keep no axes apart: nothing around these can be cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rule_cases import Case, both, none
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
    return none(function, (width,))


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
    "im2col_of_space": opaque(lambda x: F.unfold(x.view(2, 5, 4, 6), 2).reshape(2, 5, -1), 24),
    "col2im_of_space": opaque(lambda x: F.fold(x.reshape(2, 20, 6), (3, 4), 2), 24),
    "grid_sampler": opaque(
        lambda x: F.grid_sample(x.view(2, 5, 4, 6), torch.zeros(2, 2, 3, 2), align_corners=False).flatten(2), 24
    ),
    "max_unpool2d": opaque(
        lambda x: F.max_unpool2d(*F.max_pool2d(x.view(2, 5, 4, 6), 2, return_indices=True), 2).flatten(2), 24
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
    "quantile_all": opaque(lambda x: x * x.quantile(0.3)),
    "cholesky": opaque(square(lambda x: linalg.cholesky(x @ x.mT)), 9),
    "cross_entropy": opaque(lambda x: x * F.cross_entropy(x.flatten(0, 1), torch.arange(10) % 6)),
    "native_group_norm": opaque(
        lambda x: torch.native_group_norm(x.view(2, 6, 5), None, None, 2, 6, 5, 3, 1e-5)[0].view(2, 5, 6)
    ),
    "native_batch_norm": opaque(lambda x: torch.native_batch_norm(x.mT, None, None, None, None, True, 0.1, 1e-5)[0].mT),
    "native_batch_norm_given": opaque(
        lambda x: (
            aten._native_batch_norm_legit_no_training(x.mT, None, None, torch.zeros(6), torch.ones(6), 0.1, 1e-5)[0].mT
        )
    ),
    "cdist_of_ones": opaque(lambda x: torch.cdist(x, x + 1)),
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


def shapes_of(name: str, layers: int = 1, directions: int = 1, biases: bool = True) -> list[tuple[int, ...]]:
    """The weights of a recurrent layer from 6 to 4 channels."""
    rows = 4 * {"lstm": 4, "gru": 3}.get(name.split("_")[0], 1)
    first = [(rows, 6), *[(rows, 4 * directions)] * (layers - 1)]
    own = [(rows,), (rows,)] if biases else []
    return [shape for inner in first for _ in range(directions) for shape in (inner, (rows, 4), *own)]


def recurrent(
    name: str, layers: int = 1, directions: int = 1, *, biases: bool = True, first: float = 0, summed: Any = (4, 6)
) -> Case:
    """A layer over the tokens. ``first``: the state it starts from."""
    whole: tuple[Any, ...] = (biases, layers, 0.0, False, directions == 2, True)

    def layer(x: Tensor, *weights: Tensor) -> Tensor:
        start = torch.full((layers * directions, 2, 4), first) if first else torch.zeros(layers * directions, 2, 4)
        found = getattr(aten, name).input(x, [start] * 2 if name == "lstm" else start, list(weights), *whole)
        last = torch.cat([found[1].sum(0)] * directions, -1)
        return found[0] + last.unsqueeze(1)  # type: ignore[no-any-return]

    return Case(layer, (4, 6), summed, shapes=shapes_of(name, layers, directions, biases))


def step(name: str) -> Case:
    """Two steps of a cell."""

    def cell(x: Tensor, *weights: Tensor) -> Tensor:
        state: Any = [torch.zeros(10, 4)] * 2 if name == "lstm_cell" else torch.zeros(10, 4)
        for _ in range(2):
            state = getattr(aten, name)(x.flatten(0, 1), state, *weights)
        return (state[0] + state[1] if name == "lstm_cell" else state).view(2, 5, 4)  # type: ignore[no-any-return]

    return both(cell, (4, 6), shapes=shapes_of(name))


LAYERS = ["lstm", "gru", "rnn_tanh", "rnn_relu"]
RECURRENT = {name: recurrent(name) for name in LAYERS} | {f"{name}_cell": step(f"{name}_cell") for name in LAYERS}
RECURRENT |= {
    "lstm_of_two": recurrent("lstm", layers=2),
    "gru_of_both": recurrent("gru", layers=2, directions=2),
    "lstm_of_both": recurrent("lstm", directions=2, biases=False),
    "gru_from_one": recurrent("gru", first=1.0, summed=(6,)),
}
GROUPS = {"complex": COMPLEX, "opaque": OPAQUE, "recurrent": RECURRENT}
