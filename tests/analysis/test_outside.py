"""The analysis on modules that are no language models: torchvision, timm and hand-written ones, proven by cutting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import mptk
from benchmarks.tiny_weights import randomise
from mptk import analyze, trace
from mptk.ir import Analysis
from mptk.ort.sessions import OrtGraph
from mptk.testing import cut_and_compare, draw_plan

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
TOKENS = torch.arange(14).reshape(2, 7) % 11 + 1


def analysed(module: nn.Module, *inputs: Tensor) -> Analysis:
    """The analysis of ``module`` with random weights; fails unless all families, cut at once, are proven."""
    randomise(module.eval(), 0)
    analysis = analyze(trace(module, inputs))
    assert analysis.families, [b.reasons for b in analysis.blocked]
    found = cut_and_compare(analysis, draw_plan(analysis), inputs)
    assert found.error <= 1e-5 * max(1.0, found.moved), found
    assert found.moved > 1e-3, found
    return analysis


def sizes(analysis: Analysis) -> set[int]:
    return {f.size for f in analysis.families}


# ---- hand-written modules ----


class RMSNorm(nn.Module):
    """llama2.c's norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Llama2C(nn.Module):
    """One block as llama2.c's model.py writes it: interleaved rotary pairs as real arithmetic, KV heads repeated."""

    def __init__(self, width: int = 48, heads: int = 6, kv: int = 2, size: int = 8, ffn: int = 40) -> None:
        super().__init__()
        self.heads, self.kv, self.size = heads, kv, size
        self.embed, self.norm, self.ffn_norm = nn.Embedding(29, width), RMSNorm(width), RMSNorm(width)
        self.wq, self.wo = nn.Linear(width, heads * size, bias=False), nn.Linear(heads * size, width, bias=False)
        self.wk, self.wv = nn.Linear(width, kv * size, bias=False), nn.Linear(width, kv * size, bias=False)
        self.w1, self.w2 = nn.Linear(width, ffn, bias=False), nn.Linear(ffn, width, bias=False)
        self.w3, self.last, self.output = nn.Linear(width, ffn, bias=False), RMSNorm(width), nn.Linear(width, 29)
        angles = torch.outer(torch.arange(16).float(), 100.0 ** -(torch.arange(0, size, 2).float() / size))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        cos, sin = (self.get_buffer(n)[: x.shape[1], None] for n in ("cos", "sin"))
        return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(3)

    def repeat(self, x: Tensor) -> Tensor:
        b, t, kv, size = x.shape
        n = self.heads // self.kv
        return x[:, :, :, None, :].expand(b, t, kv, n, size).reshape(b, t, kv * n, size)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        b, t, _ = x.shape
        h = self.norm(x)
        q = self.rotate(self.wq(h).view(b, t, self.heads, self.size))
        k = self.repeat(self.rotate(self.wk(h).view(b, t, self.kv, self.size)))
        v = self.repeat(self.wv(h).view(b, t, self.kv, self.size))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).contiguous().view(b, t, -1))
        h = self.ffn_norm(x)
        return self.output(self.last(x + self.w2(F.silu(self.w1(h)) * self.w3(h))))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """Two levels with a skip concatenation and a transposed convolution on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, 14, 3, padding=1)
        self.up, self.join = nn.ConvTranspose2d(14, 12, 2, stride=2), nn.Conv2d(22, 9, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(9), nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down(x))
        y = F.relu(self.middle(F.max_pool2d(skip, 2)))
        y = F.relu(self.norm(self.join(torch.cat([self.up(y), skip], 1))))
        return self.last(y)  # type: ignore[no-any-return]


def test_llama2c_style():
    analysis = analysed(Llama2C(), TOKENS)
    assert {2, 3, 40, 48} <= sizes(analysis)


def test_unet_skip_concatenation():
    analysis = analysed(UNet(), IMAGE)
    assert sizes(analysis) == {10, 14, 12, 9}
    (skip,) = next(f for f in analysis.families if f.size == 10).groups
    joined = next(m for m in skip.members if m.weight == "join.weight")
    assert skip.positions(joined)[0, :, 0].tolist() == list(range(12, 22))


# ---- libraries ----

TORCHVISION: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5, width_per_group=64
    ),
    "vit": lambda: torchvision.models.VisionTransformer(32, 8, 2, 3, 24, 40, num_classes=5),
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 12, [1, 1], [2, 4], [4, 4], num_classes=5),
    "convnext": lambda: torchvision.models.ConvNeXt(
        [torchvision.models.convnext.CNBlockConfig(10, 14, 1), torchvision.models.convnext.CNBlockConfig(14, None, 1)],
        num_classes=5,
    ),
    "mobilenet_v3": lambda: torchvision.models.MobileNetV3(
        [
            torchvision.models.mobilenetv3.InvertedResidualConfig(16, 3, 24, 16, True, "RE", 1, 1, 1.0),
            torchvision.models.mobilenetv3.InvertedResidualConfig(16, 3, 40, 32, True, "HS", 2, 1, 1.0),
        ],
        last_channel=48,
        num_classes=5,
    ),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    torch.manual_seed(0)
    analysed(TORCHVISION[name](), IMAGE)


TIMM: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm.models.VisionTransformer(32, 8, num_classes=5, embed_dim=24, depth=2, num_heads=3),
    "mlp_mixer": lambda: timm.models.MlpMixer(5, 32, patch_size=8, num_blocks=2, embed_dim=24),
    "conv_mixer": lambda: timm.models.ConvMixer(18, 2, kernel_size=3, patch_size=4, num_classes=5),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    torch.manual_seed(0)
    analysed(TIMM[name](), IMAGE)


def test_what_is_written_of_them_is_the_small_model(tmp_path):
    torch.manual_seed(0)
    net, asked = TORCHVISION["convnext"](), {"sparsity": 0.3, "tolerance": 0.3, "progress": None}
    pruned = mptk.prune(net, tmp_path / "out", method="magnitude", example_inputs=IMAGE, **asked)
    assert {row["stage"] for row in pruned.report.proof} >= {"model.pt2", "ONNX Runtime"}
    x = torch.randn(3, *IMAGE.shape[1:])
    expected = pruned.model(x).detach()
    assert torch.equal(mptk.Pruned.open(tmp_path / "out").model(x), expected)
    torch.testing.assert_close(OrtGraph(tmp_path / "out" / "onnx" / "model.onnx")({"x": x}), expected)
