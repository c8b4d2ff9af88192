"""Views, transposes, slices, concatenations, repeats: what moves values and changes none."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .catalogue import Maker, step


@step(
    "layout",
    multiple=2,
    form=("heads swapped", "permute", "transpose", "movedim", "tokens apart", "minus one", "pairs", "einops", "bits"),
)
def reorder(m: Maker, x: Tensor, *, form: str) -> Tensor:
    x = x.contiguous()
    batch, length, channels = x.shape
    heads = x.view(batch, length, 2, channels // 2)
    forms = {
        "heads swapped": lambda: heads.transpose(2, 3).reshape(x.shape),
        "permute": lambda: heads.permute(0, 2, 1, 3).relu().permute(0, 2, 1, 3).reshape(x.shape),
        "transpose": lambda: x.transpose(1, 2).contiguous().relu().transpose(1, 2),
        "movedim": lambda: heads.movedim(-1, 0).movedim(0, 2).flatten(2),
        "minus one": lambda: x.view(batch, -1, channels // 2).relu().view(batch, length, -1),
        "bits": lambda: x.contiguous().view(torch.int32).view(x.dtype),
        "pairs": lambda: x.view(-1, channels // 2, 2).flip(-1).reshape(x.shape),
        "einops": lambda: (
            heads.permute(0, 2, 1, 3)
            .reshape(batch * 2, length, -1)
            .relu()
            .view(batch, 2, length, -1)
            .transpose(1, 2)
            .flatten(2)
        ),
        "tokens apart": lambda: x.reshape(batch * length, channels).relu().reshape(batch, length, channels),
    }
    return forms[form]()


@step(
    "layout",
    multiple=2,
    act=(True, False),
    form=("chunk", "split", "unbind", "getitem", "tensor_split", "select", "narrow"),
)
def take_apart(m: Maker, x: Tensor, *, act: bool, form: str) -> Tensor:
    """Two halves of the channels, multiplied or swapped."""
    half = x.shape[-1] // 2
    heads = x.unflatten(-1, (2, half))
    forms = {
        "chunk": lambda: x.chunk(2, -1),
        "split": lambda: x.split([half, half], -1),
        "unbind": lambda: heads.unbind(2),
        "getitem": lambda: (x[..., :half], x[..., half:]),
        "tensor_split": lambda: torch.tensor_split(x, 2, -1),
        "select": lambda: (heads[:, :, 0], heads[:, :, 1]),
        "narrow": lambda: (x.narrow(-1, 0, half), x.narrow(-1, half, half)),
    }
    a, b = forms[form]()
    return a * b if act else torch.cat([b, a], -1)


@step("layout", start=(0, 1, 2), stop=(None, -1, 4), stride=(1, 2))
def slice_channels(m: Maker, x: Tensor, *, start: int, stop: int | None, stride: int) -> Tensor:
    return x[..., start:stop:stride]


@step("layout", multiple=2, start=(0, 1))
def interleaved(m: Maker, x: Tensor, *, start: int) -> Tensor:
    """Rotation of pairs of neighbours, as rotary embeddings have it."""
    even, odd = x[..., ::2], x[..., 1::2]
    pairs = (odd * 0.5 - even, even + odd) if start else (-odd, even)
    return torch.stack(pairs, -1).flatten(-2)


@step("layout", sizes=((1, 2), (2, 1), (3, 2)), form=("first", "rest", "both"))
def uneven_split(m: Maker, x: Tensor, *, sizes: tuple[int, int], form: str) -> Tensor:
    a, b, c = x.split([*sizes, x.shape[-1] - sum(sizes)], -1) if x.shape[-1] > sum(sizes) else (x, x, x)
    return {"first": a, "rest": torch.cat([c, b], -1), "both": torch.cat([b, a.relu()], -1)}[form]


@step("layout", inputs=2, act=(True, False))
def cat(m: Maker, x: Tensor, y: Tensor, *, act: bool) -> Tensor:
    joined = torch.cat([x, y], -1)
    return joined.relu() if act else joined


@step("layout", inputs=2, form=("sum", "mean", "amax", "flat", "unbind"))
def stack(m: Maker, x: Tensor, y: Tensor, *, form: str) -> Tensor:
    fitted = m.fit(y, x.shape[-1])
    shape = torch.broadcast_shapes(x.shape, fitted.shape)
    both = torch.stack([x.expand(shape), fitted.expand(shape)], 2)
    if form == "unbind":
        a, b = both.unbind(2)
        return a - b.relu()
    return both.flatten(2) if form == "flat" else getattr(both, form)(2)


@step("layout", form=("repeat", "interleave", "expand", "expand outer", "tile"), times=(2, 3))
def repeat(m: Maker, x: Tensor, *, form: str, times: int) -> Tensor:
    forms = {
        "repeat": lambda: x.repeat(1, 1, times),
        "interleave": lambda: x.repeat_interleave(times, -1),
        "expand": lambda: x[..., None].expand(-1, -1, -1, times).reshape(*x.shape[:2], -1),
        "expand outer": lambda: x[:, :, None].expand(-1, -1, times, -1).flatten(2),
        "tile": lambda: torch.tile(x, (times,)),
    }
    return forms[form]()


@step("layout", dim=(1, 2), form=("roll", "flip"), residual=(True, False))
def shift(m: Maker, x: Tensor, *, dim: int, form: str, residual: bool) -> Tensor:
    y = x.roll(1, dim) if form == "roll" else x.flip(dim)
    return x + y if residual else y


@step("layout", form=("zeros", "number", "token", "reflect"))
def pad(m: Maker, x: Tensor, *, form: str) -> Tensor:
    forms = {
        "zeros": lambda: F.pad(x, (1, 2)),
        "number": lambda: F.pad(x, (0, 1), value=0.5),
        "token": lambda: x - F.pad(x, (0, 0, 1, -1)),
        "reflect": lambda: F.pad(x, (1, 1), mode="reflect"),
    }
    return forms[form]()


@step("layout", form=("previous", "last", "first", "mix", "mean"))
def tokens(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """Tokens that see others: the one before, the last, the first, a learned mix of all."""
    length = x.shape[1]
    forms = {
        "previous": lambda: torch.cat([x[:, :1], x[:, :-1]], 1) * m.weight(x.shape[-1]),
        "last": lambda: x + x[:, -1:],
        "first": lambda: x * x[:, 0].unsqueeze(1).tanh(),
        "mix": lambda: x + m.linear(m.linear(x.transpose(1, 2), 9).relu(), length).transpose(1, 2),
        "mean": lambda: x - x.mean(1, keepdim=True),
    }
    return forms[form]()


@step("layout", form=("slice", "embedding", "buffer"))
def positions(m: Maker, x: Tensor, *, form: str) -> Tensor:
    """Learned positions, longer than the sequence, or a constant table."""
    length, channels = x.shape[1:]
    if form == "buffer":
        return x + torch.arange(length * channels, device=x.device).view(length, channels).to(x.dtype).sin()
    table = m.weight(7, channels)
    return x + (table[:length] if form == "slice" else F.embedding(torch.arange(length, device=x.device), table))
