"""Pooling, resampling and shuffling over space and channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rule_cases import Case, both, none
from rule_cases_sums import along, image, volume
from torch import Tensor

aten = torch.ops.aten


def pixels(x: Tensor) -> Tensor:
    """[2, 5, 6·2·2·3·4] → images [10, 6·2·2, 3, 4]."""
    return x.reshape(10, 24, 3, 4)


POOLS: dict[str, Case] = {
    "max_pool1d": Case(along(lambda x: F.max_pool1d(x, 2))),
    "max_pool1d_positions": Case(along(lambda x: F.max_pool1d(x, 2, return_indices=True)[0])),
    "max_pool2d": Case(image(lambda x: F.max_pool2d(x, (2, 1)))),
    "max_pool2d_positions": Case(image(lambda x: F.max_pool2d(x, (2, 1), return_indices=True)[0])),
    "max_pool2d_used": Case(
        image(lambda x: sum(F.max_pool2d(x, (2, 1), return_indices=True))),  # type: ignore[arg-type]
        summed=(),
    ),
    "max_pool3d": Case(volume(lambda x: F.max_pool3d(x, (2, 1, 1)))),
    "max_pool3d_positions": Case(volume(lambda x: F.max_pool3d(x, (2, 1, 1), return_indices=True)[0])),
    "max_pool_unbatched": Case(
        lambda x: F.max_pool2d(x.permute(2, 0, 1), 2).permute(1, 2, 0)[:, [0, 1, 1, 0, 1]].repeat(2, 1, 1)
    ),
    "avg_pool1d": Case(along(lambda x: F.avg_pool1d(x, 2))),
    "avg_pool2d": Case(image(lambda x: F.avg_pool2d(x, (2, 1)))),
    "avg_pool3d": Case(volume(lambda x: F.avg_pool3d(x, (2, 1, 1)))),
    "adaptive_avg_pool1d": Case(along(lambda x: F.adaptive_avg_pool1d(x, 2))),
    "adaptive_avg_pool2d": Case(image(lambda x: F.adaptive_avg_pool2d(x, (2, 1)))),
    "adaptive_avg_pool3d": Case(volume(lambda x: F.adaptive_avg_pool3d(x, (2, 1, 1)))),
    "adaptive_max_pool1d": Case(along(lambda x: F.adaptive_max_pool1d(x, 2))),
    "adaptive_max_pool2d": Case(image(lambda x: F.adaptive_max_pool2d(x, (2, 1)))),
    "adaptive_max_pool3d": Case(volume(lambda x: F.adaptive_max_pool3d(x, (2, 1, 1)))),
    "lp_pool1d": Case(along(lambda x: F.lp_pool1d(x, 2, 2))),
    "max_pool_exp": Case(along(lambda x: F.max_pool1d(x.exp(), 2)), summed=()),
    "pooled_channels": none(lambda x: F.avg_pool1d(x, 2)),
}
UPSAMPLED: dict[str, Case] = {
    "upsample_nearest1d": Case(along(lambda x: F.interpolate(x, scale_factor=2))),
    "upsample_nearest2d": Case(image(lambda x: F.interpolate(x, scale_factor=2))),
    "upsample_nearest3d": Case(volume(lambda x: F.interpolate(x, scale_factor=2))),
    "upsample_exact1d": Case(along(lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"))),
    "upsample_exact2d": Case(image(lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"))),
    "upsample_exact3d": Case(volume(lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"))),
    "upsample_linear1d": Case(along(lambda x: F.interpolate(x, scale_factor=2, mode="linear"))),
    "upsample_bilinear2d": Case(image(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"))),
    "upsample_trilinear3d": Case(volume(lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"))),
    "upsample_bicubic2d": Case(image(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"))),
    "upsample_bilinear2d_aa": Case(image(lambda x: F.interpolate(x, size=(3, 1), mode="bilinear", antialias=True))),
    "upsample_bicubic2d_aa": Case(image(lambda x: F.interpolate(x, size=(3, 1), mode="bicubic", antialias=True))),
}
UNFOLDED: dict[str, Case] = {
    "im2col": Case(lambda x: F.unfold(x.mT.reshape(2, 6, 5, 1), (3, 1), padding=(1, 0)).mT),
    "im2col_exp": Case(lambda x: F.unfold(x.exp().mT.reshape(2, 6, 5, 1), (3, 1), padding=(1, 0)).mT, summed=()),
    "im2col_unbatched": Case(lambda x: F.unfold(x[0].mT.reshape(6, 5, 1), (2, 1)).mT.expand(2, 4, 12)),
    "col2im": both(lambda x: F.fold(x.mT, (6, 1), (2, 1)).squeeze(-1).mT, (3,)),
    "col2im_exp": Case(lambda x: F.fold(x.exp().mT, (6, 1), (2, 1)).squeeze(-1).mT, (3,), ()),
    "convolved": both(
        lambda x, w: (w @ F.unfold(x.mT.reshape(2, 6, 5, 1), (3, 1), padding=(1, 0))).mT, (4, 6), shapes=[(4, 18)]
    ),
}
SHUFFLED: dict[str, Case] = {
    # The 6 channels pass, and so do height and width; the 2 · 2 pixels do not.
    "pixel_shuffle": both(lambda x: F.pixel_shuffle(pixels(x), 2).reshape(2, 5, -1), (3, 4, 6), (288,)),
    "pixel_shuffle_conv": both(image(lambda x, w: F.pixel_shuffle(F.conv2d(x, w), 2)), (3, 6), shapes=[(12, 6, 1, 1)]),
    "pixel_unshuffle": both(lambda x: F.pixel_unshuffle(x.view(10, 6, 6, 8), 2).reshape(2, 5, -1), (3, 4, 6), (288,)),
    "channel_shuffle": both(along(lambda x: F.channel_shuffle(x.unsqueeze(-1), 3).squeeze(-1)), (3, 8), (24,)),
    "native_channel_shuffle": both(
        along(lambda x: F.native_channel_shuffle(x.unsqueeze(-1), 3).squeeze(-1)), (3, 8), (24,)
    ),
}
GROUPS = {"windows": UNFOLDED, "pools": POOLS, "resampling": UPSAMPLED, "shuffles": SHUFFLED}
