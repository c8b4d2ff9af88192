"""estimate: what a run will need, from the sizes of a model: memory, disk, and time by stage (docs/scale.md).

Weights are read stage by stage. Those that the memory bound holds stay resident in float32; the rest is read again in
every pass over the model.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mptk.cost.fixed import ONNX_S, START_S, TRACE_S
from mptk.cost.operator_times import describe_machine, measure_typical_ms
from mptk.errors import MptkError
from mptk.files import format_json, make_scratch, make_staging
from mptk.io import cache_dir, keep, read_kept
from mptk.plain import hash_text
from mptk.reading import make_typed

CPU = torch.device("cpu")

BASE = 600_000_000
"""Bytes of a process that has imported everything and holds no weights."""
STAGE_TOKENS = 2048
"""Most tokens that go through a stage at once."""
LOGITS_COPIES = 3
"""Copies of a batch's logits while a loss is taken."""
EFFICIENCY = 0.7
"""Share of the matrix product's rate that a whole forward pass in float32 reaches. What it does beside products (norms,
attention, conversions) does not become faster in a type whose products are. Runs in bfloat16 that this planned for 20
minutes, with products seven times as fast, took 18 to 21 minutes of the processor (``benchmarks/maskprune.md``)."""

SAMPLE = 32 << 20
"""Numbers in the file whose reading and writing is timed."""
SLOW = 1.0
"""Seconds that one run of the timed product takes at most."""
ORDINARY_DISK = (5e8, 2e8)
"""Bytes a second that a disk reads and writes, if it cannot be timed."""
RATES = ("flops", "read", "write", "speedup")
"""The fields of ``Machine`` that are kept."""
RATES_VERSION = 3
"""Raise it if rates are measured in another way. Stored rates are then measured again."""


@dataclass(frozen=True)
class Machine:
    """Rates, each for a second.

    ``flops``: operations of a float32 matrix product. ``read``: bytes of stored weights that are read and made float32.
    ``write``: bytes written to the disk. ``speedup``: how many times as fast a product is in the type of the settings.
    ``note``: why the rates were measured although there is a file with them, or why they could not be kept; else empty.
    """

    flops: float
    read: float
    write: float
    speedup: float = 1.0
    note: str = ""

    def __post_init__(self) -> None:
        if min(self.flops, self.read, self.write, self.speedup) <= 0:
            raise ValueError("a rate is not above 0")


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model, in numbers.

    ``parameters``, ``blocks``: parameters of the model and of all blocks. ``stage``: parameters of the largest block
    or, if it is larger, of the largest tensor. ``products``: parameters that a token is multiplied with; in a mixture
    only the experts that it is routed to. ``hidden``, ``widest``: most numbers of a token between blocks and within.
    ``fit``: operations to reconstruct all consumers in the blocks. ``fitted``: the parameters of these. ``stored``:
    bytes of a stored number.
    """

    parameters: int
    blocks: int
    stage: int
    products: int
    hidden: int
    widest: int
    heads: int
    vocab: int
    layers: int
    fit: float
    fitted: int
    stored: int

    @staticmethod
    def of(
        model: nn.Module, blocks: Sequence[nn.Module], *, stored: int, heads: int, vocab: int, experts: int = 0
    ) -> ModelSizes:
        """The sizes of a module, which may be on the meta device.

        ``blocks``: its layers. ``experts``: to how many experts of a mixture a token is routed; 0 if not known.
        """

        # Parameters, of all and of each block.
        count = {name: p.numel() for name, p in model.named_parameters()}
        inner = [sum(p.numel() for p in block.parameters()) for block in blocks]
        matrices = [p.shape for block in blocks for p in block.parameters() if p.ndim == 2]
        looked_up = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        multiplied = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}

        # A model without embeddings (of images) is as wide as the shortest side of its matrices.
        narrow = min((min(shape) for shape in matrices), default=0)
        routed = [(p, min(1.0, experts / p.shape[0])) for p in find_expert_weights(blocks)] if experts else []
        widest = max(
            [max(s) for s in matrices] + [round(part * len(p)) * max(p.shape[1:]) for p, part in routed] or [0]
        )
        embedding = max((w.shape[1] for w in looked_up), default=narrow)

        # Consumers write into the residual stream: their outputs are as many as its channels, and their inputs as many
        # or more.
        fitted = [(n, k) for n, k in matrices if k >= n == embedding]
        return ModelSizes(
            parameters=sum(count.values()),
            blocks=sum(inner),
            stage=max([*inner, *count.values()]),
            products=sum(count.values())
            - sum(w.numel() for w in looked_up - multiplied)
            - round(sum((1 - part) * p.numel() for p, part in routed)),
            hidden=embedding,
            widest=widest,
            heads=heads,
            vocab=vocab,
            layers=len(blocks),
            # LU of [k, k], then its solution for n right sides.
            fit=sum(2 / 3 * k**3 + 2 * n * k**2 for n, k in fitted),
            fitted=sum(n * k for n, k in fitted),
            stored=stored,
        )

    def count_flops(self, length: int) -> float:
        """Operations of a token in a window of ``length`` tokens."""
        return 2 * self.products + 4 * length * self.hidden * self.layers


def find_expert_weights(blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """The weights of a mixture's experts, [experts, …, …]: transformers packs a layer's experts into one tensor."""
    return [
        p
        for block in blocks
        for module in block.modules()
        if not isinstance(module, nn.Conv1d)
        for p in module.parameters(recurse=False)
        if p.ndim == 3
    ]


@dataclass(frozen=True)
class Pass:
    """What a stage does with the whole model: ``tokens`` in windows of ``length``, ``reads`` times through the weights.

    ``exact``: whether it computes in float32 whatever the settings say. ``flops``: further operations, in float32.
    ``gradients``: whether the gradients of all weights are kept. ``training``: bytes that training takes beside the
    weights; 0 if nothing is trained. ``fixed``: seconds for each layer, whatever the number of tokens.
    """

    tokens: float
    length: int
    reads: float = 1
    exact: bool = False
    flops: float = 0
    gradients: bool = False
    training: float = 0
    fixed: float = 0

    def repeat(self, count: int) -> Pass:
        """The same stage ``count`` times."""
        more = {name: count * getattr(self, name) for name in ("tokens", "reads", "flops", "fixed")}
        return replace(self, **more)


@dataclass(frozen=True)
class Work:
    """What a run does. ``kept``: share of the parameters that is left.

    ``passes``: stage → its pass. ``calibration``: tokens of all windows. ``evaluated``: tokens whose logits are in
    memory at once. ``onnx``: bytes of a number in each graph. ``models``: models of the dense size that training holds.
    """

    kept: float
    passes: Mapping[str, Pass]
    calibration: int
    evaluated: int
    length: int
    onnx: tuple[float, ...] = ()
    models: int = 1


@dataclass(frozen=True)
class Estimate:
    """What a run will need. Each field maps a purpose to an amount.

    ``needed``: bytes of memory without which it cannot run. ``held``: bytes of memory that a smaller bound reduces.
    ``there``: bytes of memory of ``device``, which is "" if the CPU computes. ``output``, ``temporary``: bytes of disk.
    ``seconds``: stage → time. ``does``: how much the run does, in words. ``note``: on the measured rates.
    """

    needed: Mapping[str, float]
    held: Mapping[str, float]
    output: Mapping[str, float]
    temporary: Mapping[str, float]
    seconds: Mapping[str, float]
    there: Mapping[str, float] = field(default_factory=dict)
    device: str = ""
    does: str = ""
    note: str = ""

    def __str__(self) -> str:
        memory, disk = (
            sum([*a.values(), *b.values()]) for a, b in ((self.needed, self.held), (self.output, self.temporary))
        )
        time = describe_duration(sum(self.seconds.values()))
        there = f", {describe_size(sum(self.there.values()))} on {self.device}" if self.device else ""
        does = f" for {self.does}" if self.does else ""
        note = f" ({self.note})" if self.note else ""
        sizes = f"{describe_size(memory)} of memory{there}, {describe_size(disk)} of disk"
        return f"will need about {sizes} and {time}{does}{note}"


def estimate(sizes: ModelSizes, work: Work, on: Machine, bound: float, device: str = "") -> Estimate:
    """What ``work`` needs if resident weights and values between stages take at most ``bound`` bytes.

    ``device``: what computes, if it is not the CPU. It then holds activations, what is trained, values between stages,
    and a copy of each stage's weights.
    """

    # Float32 weights, and twice the float32 residual stream of all calibration tokens as values between stages.
    weights, borders = 4.0 * sizes.parameters, 8.0 * work.calibration * sizes.hidden
    fitted = 4.0 * sizes.fitted if "reconstruct" in work.passes else 0.0
    kept_borders, kept_fit = min(borders, bound / 4), min(fitted, bound / 8)
    training = max((done.training for done in work.passes.values()), default=0.0)
    trains = training > 0

    # Training holds the whole model. Otherwise values between stages and fitted weights take their shares of the bound,
    # and weights the rest; what does not fit is read again in each pass.
    resident = weights if trains else min(weights, bound - kept_borders - kept_fit)
    missing = (1 - resident / weights) * sizes.parameters * sizes.stored

    # Memory: what weights take, what computing takes, what lies between stages. With a device the last two are there.
    loaded = {
        "weights": work.models * weights if trains else 0,
        "cut model": work.kept * weights if trains else 0,
        "largest stage": 4 * sizes.stage * ((resident < weights) + work.kept),
    }
    computed = {
        "training": training,
        "activations": 4 * STAGE_TOKENS * (6 * sizes.hidden + 3 * sizes.widest + 2 * sizes.heads * work.length),
        "logits": 4 * LOGITS_COPIES * work.evaluated * sizes.vocab,
    }
    between = {"values between stages": kept_borders + kept_fit}
    needed = {"libraries": BASE, **loaded, **({} if device else computed)}
    held = {"weights that stay": 0 if trains else resident, **({} if device else between)}
    there = {**loaded, "largest stage": 4 * sizes.stage * (1 + work.kept), **computed, **between} if device else {}

    # Disk: the result, and what goes to temporary files beyond the bound.
    output = {
        "checkpoint": work.kept * sizes.parameters * sizes.stored,
        "ONNX": sum(work.onnx) * work.kept * sizes.parameters,
        "fitted weights": fitted,
    }
    temporary = {
        "values between stages": borders - kept_borders + fitted - kept_fit,
        "gradients": max(0, weights - bound) if any(done.gradients for done in work.passes.values()) else 0,
    }

    # Time: the fixed parts, then each stage's operations and reads.
    reading, writing = sizes.parameters * sizes.stored / on.read, sum(output.values()) / on.write
    seconds = {"start": START_S, "read": reading, "trace and analyse": TRACE_S * sizes.layers}
    for stage, done in work.passes.items():
        products = 1 if done.exact else 1 / on.speedup
        beside = 1 / EFFICIENCY - 1
        operations = done.tokens * sizes.count_flops(done.length)
        computing = (operations * (products + beside) + done.flops / EFFICIENCY) / on.flops
        seconds[stage] = computing + done.fixed * sizes.layers + done.reads * missing / on.read
    seconds["write"] = writing + missing / on.read + (ONNX_S * sizes.layers if work.onnx else 0)
    return Estimate(
        _drop_zeros(needed),
        _drop_zeros(held),
        _drop_zeros(output),
        _drop_zeros(temporary),
        seconds,
        _drop_zeros(there),
        device,
        note=on.note,
    )


def _drop_zeros(parts: Mapping[str, float]) -> dict[str, float]:
    return {name: size for name, size in parts.items() if size}


# ---- this machine ----


def measure_machine(device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Machine:
    """The rates of this machine, measured in a second or two and kept in the cache folder, if it can be written.

    ``device``: of the matrix product. ``dtype``: of the faster one.
    """
    about = list_rate_factors(device, dtype)
    file = name_rates_file(about)
    # Without a writable cache each process would measure again at each call.
    if file in _unkept:
        return _unkept[file]

    # A damaged file is measured again, and said in the note.
    kept, note = read_kept(file)
    if kept:
        try:
            return replace(make_typed(Machine, kept.get("rates"), "rates"), note="")
        except ValueError as error:
            note = f"{file} is damaged: {error}; it is made again"
    found = calibrate(file.parent, device, dtype)
    if why := keep(file, {"machine": about, "rates": {name: getattr(found, name) for name in RATES}}):
        _unkept[file] = found = replace(found, note=f"this machine was measured, and not for a later run: {why}")
    return replace(found, note=note) if note and not why else found


def list_rate_factors(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """All that rates depend on."""
    about: dict[str, object] = {
        **describe_machine(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rates": RATES_VERSION,
    }
    if device.type != "cpu":
        name = getattr(torch.get_device_module(device), "get_device_name", str)
        about["device"] = f"{device.type} {name(device)}"
    if dtype is not torch.float32:
        about["dtype"] = str(dtype)
    return about


def name_rates_file(about: Mapping[str, object]) -> Path:
    """The file in the cache folder that keeps the rates of what ``list_rate_factors`` describes."""
    # The name is a digest of it, so another version of torch measures again.
    return cache_dir() / "machine" / f"{hash_text(format_json(about), 16)}.json"


_unkept: dict[Path, Machine] = {}
"""File in the cache that cannot be written → what this process measured."""


def calibrate(folder: Path, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Machine:
    """Time a matrix product on ``device``, and files in ``folder`` or, if it cannot be written, a temporary one."""
    flops = measure_product_rate(device, torch.float32)
    speedup = 1.0 if dtype is torch.float32 else measure_product_rate(device, dtype) / flops
    for temporary in (False, True):
        with contextlib.suppress(OSError, SafetensorError, MptkError):  # no right to write, no room: go on
            if not temporary:
                folder.mkdir(parents=True, exist_ok=True)
            with make_scratch() if temporary else make_staging(folder) as staging:
                return Machine(flops, *measure_disk_rates(staging.folder), speedup)
    return Machine(flops, *ORDINARY_DISK, speedup)


def measure_disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes a second of the best of three files in ``folder``: bf16, read as float32; and written."""
    numbers = torch.ones(SAMPLE, dtype=torch.bfloat16)
    # The best of three: other processes only make it slower.
    wrote, read = [], []
    for i in range(3):
        file, start = folder / str(i), time.perf_counter()
        save_file({"x": numbers}, file)
        with file.open("rb") as written:
            # Without it the time would be of memory, not of the disk.
            os.fsync(written.fileno())
        wrote.append(time.perf_counter() - start)
        start = time.perf_counter()
        load_file(file)["x"].float()
        read.append(time.perf_counter() - start)
    return numbers.nbytes / min(read), numbers.nbytes / min(wrote)


def measure_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product.

    On a CPU a small product is timed first. If a large one would take long (bfloat16 on a CPU without instructions for
    it), the small one's rate is taken. One thread is timed, too, by its processor time: on a busy machine, all threads
    together can be a hundred times slower than one.
    """
    if device.type != "cpu":
        return _measure_rate(device, dtype, (4096, 4096, 4096), 0)
    small, large = (64, 1024, 256), (1024, 1024, 4096)
    rate = _measure_rate(device, dtype, small, 1)
    if 2 * math.prod(large) / rate > SLOW:
        return rate
    return max(_measure_rate(device, dtype, large, threads) for threads in {1, torch.get_num_threads()})


def _measure_rate(device: torch.device, dtype: torch.dtype, size: tuple[int, int, int], threads: int) -> float:
    """The rate of one product: rows, inner size, columns. A number of it is read, so that a device has finished.

    ``threads``: of the CPU; 0 for a device, whose time is not a thread's.
    """
    rows, inner, columns = size
    x, w = (torch.ones(shape, dtype=dtype, device=device) for shape in ((rows, inner), (inner, columns)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        ms = measure_typical_ms(lambda: (x @ w)[0, 0].item(), threads, seconds=0.3)
    finally:
        torch.set_num_threads(before)
    return 2 * rows * inner * columns / ms * 1e3


# ---- as text ----


def describe_size(size: float) -> str:
    """Bytes as ``2.1 GB`` or ``30 MB``."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def describe_duration(seconds: float) -> str:
    """Seconds as ``40 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
