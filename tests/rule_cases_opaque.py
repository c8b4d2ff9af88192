"""Complex numbers, and ops that keep no axes apart: nothing around these can be cut."""

from __future__ import annotations

from collections.abc import Callable

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
    "pixel_shuffle": opaque(lambda x: torch.pixel_shuffle(x.view(2, 5, 4, 2, 3), 2).flatten(2), 24),
    "pixel_unshuffle": opaque(lambda x: torch.pixel_unshuffle(x.view(2, 5, 1, 4, 6), 2).flatten(2), 24),
    "im2col": opaque(lambda x: torch.nn.functional.unfold(x.view(2, 5, 4, 6), 2).reshape(2, 5, -1), 24),
    "col2im": opaque(lambda x: torch.nn.functional.fold(x.reshape(2, 20, 6), (3, 4), 2), 24),
    "grid_sampler": opaque(
        lambda x: torch.nn.functional.grid_sample(
            x.view(2, 5, 4, 6), torch.zeros(2, 2, 3, 2), align_corners=False
        ).flatten(2),
        24,
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
GROUPS = {"complex": COMPLEX, "opaque": OPAQUE}
