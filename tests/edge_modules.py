"""Random modules at the edges of a trace: arithmetic on sizes, state outside of attributes, gradients, types, containers.

Each is pruned through the public API. The pruned module, the one that is opened from its folder, the archive in plain
torch and, of some, the ONNX graph are called beside the eager module, whose removed weights are zero, at many sizes, in
other types and strides, with and without gradients. Every call must be equal or refused; a gradient that differs must be
named in the report.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mptk
from mptk import MptkError
from mptk.ir import resolve_plan, take_apart
from tests.programs.oracles import zeroed

REFUSED, EQUAL = "refused", "equal"
SIZES = [(3, 6), (1, 6), (2, 7), (4, 5), (5, 12), (3, 9), (7, 3), (2, 16), (3, 33), (6, 6)]
NEAR = 1e-4


@dataclass
class Outcome:
    """What became of a module: calls that were equal and refused, and the cause of another verdict."""

    verdict: str
    cause: str = ""
    calls: tuple[int, int] = (0, 0)


# ---- arithmetic on sizes ----


def expression(rng: random.Random, depth: int) -> str:
    """Python of ``b`` and ``n``, the sizes of the batch and of the length. Most of it is a number of any type."""
    if depth == 0:
        return rng.choice(["n", "n", "b", str(rng.randint(1, 9)), f"{rng.randint(1, 30) / 4}"])
    a, c = expression(rng, depth - 1), expression(rng, rng.randint(0, depth - 1))
    return rng.choice(
        [
            *(
                f"({a} + {c})",
                f"({a} - {c})",
                f"({a} * {c})",
                f"({a} / (1 + abs({c})))",
                f"({a} // {rng.randint(1, 5)})",
            ),
            *(f"({a} % {rng.randint(2, 6)})", f"int({a})", f"round({a})", f"math.ceil({a})", f"math.floor({a})"),
            *(f"abs({a})", f"max({a}, {c})", f"min({a}, {c})", f"math.sqrt(abs({a}))", f"math.log2(1 + abs({a}))"),
            *(f"(int({a}) & {rng.choice([1, 3, 7])})", f"2 ** (int(abs({a})) % 5)", f"abs({a}) ** 0.5"),
        ]
    )


def sized(rng: random.Random) -> Callable[[Any, Tensor, Tensor], Tensor]:
    """Hidden units by an expression of the sizes: a factor, a branch, a part of the positions, or a repeat."""
    text = expression(rng, rng.randint(1, 3))
    number = eval(f"lambda b, n: {text}", {"math": math})  # noqa: S307
    level = rng.choice([0, 1, 2, 3.5, 6, 10])
    forms: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
        "factor": lambda net, h, x: h * (1 + number(x.shape[0], x.shape[1]) % 5),
        "branch": lambda net, h, x: h * 2 if number(x.shape[0], x.shape[1]) > level else h,
        "equal": lambda net, h, x: h * 2 if number(x.shape[0], x.shape[1]) == level else h,
        "part": lambda net, h, x: h[:, : max(1, int(number(x.shape[0], x.shape[1])) % (x.shape[1] + 1))],
        "loop": lambda net, h, x: _often(h, int(abs(number(x.shape[0], x.shape[1]))) % 4),
    }
    form = rng.choice(list(forms))
    return named(forms[form], f"{form} {text} {level}")


def _often(h: Tensor, times: int) -> Tensor:
    for _ in range(times):
        h = torch.tanh(h)
    return h


def named(body: Callable[..., Any], text: str) -> Callable[..., Any]:
    body.__doc__ = text
    return body


# ---- state outside of attributes ----

COUNT, SEEN, HELD = 0, list[int](), {"calls": 0}


def of_state(rng: random.Random) -> Callable[..., Any]:
    often = rng.choice([2, 5, 50])

    def in_a_global(net: Any, h: Tensor, x: Tensor) -> Tensor:
        global COUNT
        COUNT += 1
        return h * 2 if COUNT % often == 0 else h

    def in_a_list(net: Any, h: Tensor, x: Tensor) -> Tensor:
        SEEN.append(1)
        return h * 2 if len(SEEN) % often == 0 else h

    def in_a_dict(net: Any, h: Tensor, x: Tensor) -> Tensor:
        HELD["calls"] += 1
        return h * 2 if HELD["calls"] % often == 0 else h

    def in_a_class(net: Any, h: Tensor, x: Tensor) -> Tensor:
        Edge.calls += 1
        return h * 2 if Edge.calls % often == 0 else h

    count = 0

    def in_a_closure(net: Any, h: Tensor, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return h * 2 if count % often == 0 else h

    return rng.choice([in_a_global, in_a_list, in_a_dict, in_a_class, in_a_closure])


# ---- gradients ----


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return -gradient


@torch.no_grad()
def decorated(net: Any, h: Tensor) -> Tensor:
    return h * net.scale


def without(net: Any, h: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        return h * net.scale


def within(net: Any, h: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = h * net.scale
        with torch.enable_grad():
            return y + net.shift


def hooked(net: Any, h: Tensor, x: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient * 3)
    return h


GRADIENTS: list[Callable[..., Any]] = [
    *(without, within, hooked),
    named(lambda net, h, x: decorated(net, h), "decorated"),
    named(lambda net, h, x: h + decorated(net, h), "decorated beside"),
    named(lambda net, h, x: Straight.apply(h), "straight"),
    named(lambda net, h, x: Reversed.apply(h), "reversed"),
    named(lambda net, h, x: h.detach() * net.scale + h, "detached"),
    named(lambda net, h, x: h * 2 if torch.is_grad_enabled() else h, "is_grad_enabled"),
    named(lambda net, h, x: h * 2 if x.requires_grad else h, "x.requires_grad"),
    named(lambda net, h, x: h * 2 if h.requires_grad else h, "h.requires_grad"),
    named(lambda net, h, x: torch.utils.checkpoint.checkpoint(torch.tanh, h, use_reentrant=False), "checkpoint"),
]

# ---- types and strides ----

TYPES: list[Callable[..., Any]] = [
    named(lambda net, h, x: h * (2 if x.dtype == torch.float64 else 1), "x.dtype"),
    named(lambda net, h, x: h.to(net.scale.dtype).to(h.dtype), "to a weight's type"),
    named(lambda net, h, x: (h.double() * net.scale.double()).to(h.dtype), "double between"),
    named(lambda net, h, x: h * (2 if x.is_contiguous() else 1), "is_contiguous"),
    named(lambda net, h, x: h * (1 + x.stride(1) % 3), "stride"),
    named(lambda net, h, x: h * (2 if h.transpose(0, 1).is_contiguous() else 1), "is_contiguous of a transpose"),
    named(lambda net, h, x: h * (2 if x.element_size() > 4 else 1), "element_size"),
    named(lambda net, h, x: h + x.new_zeros(()), "new_zeros"),
    named(lambda net, h, x: h * (2 if torch.is_floating_point(x) else 1), "is_floating_point"),
]

# ---- containers ----


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclasses.dataclass
class Both:
    logits: Tensor
    more: Any = None


CONTAINERS: list[Callable[[Tensor], Any]] = [
    lambda y: y,
    lambda y: y,
    lambda y: {"y": y, "n": None},
    lambda y: OrderedDict(b=y, a=y * 2),
    lambda y: (y,),
    lambda y: [y, (y + 1, {"k": y})],
    lambda y: Pair(y, [y * 2, 3]),
    lambda y: Both(y, Pair(y, None)),
    lambda y: {"in": Both(y, {"deep": (y,)})},
]


class Edge(nn.Module):
    calls = 0

    def __init__(self, bodies: list[Callable[..., Any]], container: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(8, 24), nn.Linear(24, 10), nn.Linear(10, 5)
        self.scale, self.shift = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(24))
        self.bodies, self.container = bodies, container

    def forward(self, x: Tensor) -> Any:
        h = self.up(x).relu()
        for body in self.bodies:
            h = body(self, h, x)
        return self.container(self.out(self.down(h)))


def edge(seed: int) -> tuple[Edge, str]:
    """The module of a seed, and what it is made of."""
    rng = random.Random(seed)
    draws = [sized, sized, lambda r: r.choice(GRADIENTS), lambda r: r.choice(TYPES), of_state]
    weights = [4, 4, 4, 3, 1]
    bodies = [draw(rng) for draw in rng.choices(draws, weights, k=rng.randint(1, 2))]
    torch.manual_seed(seed)
    net = Edge(bodies, rng.choice(CONTAINERS)).eval()
    return net, "; ".join(body.__doc__ or body.__name__ for body in bodies)


def given(sizes: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(*sizes, 8, generator=torch.Generator().manual_seed(seed))


def calls() -> Iterator[tuple[str, Callable[[], Tensor], bool]]:
    """Ways to call: in words, the input, whether gradients are on."""
    for sizes in SIZES:
        yield f"{sizes}", lambda sizes=sizes: given(sizes), False
    yield "gradients on", lambda: given((3, 6)), True
    yield "an input with gradients", lambda: given((3, 6)).requires_grad_(), True
    yield "other strides", lambda: given((3, 6)).transpose(0, 1).contiguous().transpose(0, 1), False
    yield "columns first", lambda: given((3, 6)).transpose(1, 2).contiguous().transpose(1, 2), False
    yield "every second", lambda: given((6, 6))[::2], False
    yield "float64", lambda: given((3, 6)).double(), False


def check(seed: int, onnx: bool) -> Outcome:
    """Prune the module of a seed, and call all its forms."""
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    net, text = edge(seed)
    place = Path(tempfile.mkdtemp(prefix="edge-"))
    try:
        asked: dict[str, Any] = {"sparsity": 0.3, "align": 1, "tolerance": 0.3, "method": "magnitude", "progress": None}
        try:
            pruned = mptk.prune(net, place / "out", example_inputs=given((3, 6)), onnx=onnx, **asked)
        except MptkError as error:
            verdict = "please report" if "report this model" in str(error) else REFUSED
            return Outcome(verdict, str(error) if verdict == REFUSED else f"{error} in {seed}: {text}")
        return _compare(net, pruned, place / "out", f"{seed}: {text}")
    finally:
        shutil.rmtree(place)


def _compare(net: Edge, pruned: mptk.Pruned, folder: Path, text: str) -> Outcome:
    analysis = pruned.compiled.prepared.analysis
    plain = torch.export.load(folder / "model.pt2").module()
    plain.load_state_dict(load_file(folder / "model.safetensors"), assign=True)
    forms: dict[str, Callable[[Tensor], Any]] = {
        "in memory": pruned.model,
        "opened": mptk.Pruned.open(folder).model,
        "plain torch": plain,
    }
    if (file := folder / "onnx" / "model.onnx").is_file():
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(file, options)
        forms["ONNX"] = lambda x: [torch.tensor(y) for y in session.run(None, {"x": x.detach().numpy()})]
    equal = refused = 0
    for form, run in forms.items():
        own = form in ("in memory", "opened")
        for name, make, on in calls():
            if not own and not name.startswith("("):
                continue  # a graph in another program sees no gradients, types or strides of Python
            with torch.set_grad_enabled(on):
                try:
                    expected: Any = zeroed(net, analysis, pruned.plan)(make())
                except Exception:
                    expected = None
                try:
                    found = run(make())
                except Exception as error:
                    if expected is not None and own and not isinstance(error, MptkError):
                        return Outcome("crashed", f"{form}, {name}: {type(error).__name__}: {error} in {text}")
                    refused += 1
                    continue
            if expected is None:
                return Outcome("wrong", f"{form}, {name}: it runs, and the module does not, in {text}")
            if said := _apart(found, expected, own):
                return Outcome("wrong", f"{form}, {name}: {said} in {text}")
            equal += 1
    if said := _gradients_apart(net, pruned):
        return Outcome("wrong", f"{said} in {text}")
    return Outcome(EQUAL, "", (equal, refused))


def _apart(found: Any, expected: Any, own: bool) -> str:
    """How outputs differ; of mptk's own modules their containers count, too."""
    (one, kind), (other, wanted) = take_apart(found), take_apart(expected)
    if own and kind != wanted:
        return f"it gives {type(found).__name__} in other nests than {type(expected).__name__}"
    if [t.shape for t in one] != [t.shape for t in other]:
        return "other shapes"
    if [t.dtype for t in one] != [t.dtype for t in other]:
        return "other types"
    for a, b in zip(one, other, strict=True):
        apart = (a - b).abs().max().item() if a.numel() else 0.0
        if not apart <= NEAR * max(b.abs().max().item() if b.numel() else 0.0, 1e-3):
            return f"outputs differ by {apart:.1e}"
    return ""


def _gradients_apart(net: Edge, pruned: mptk.Pruned) -> str:
    """Whether a gradient differs that the report does not name."""
    if any(note.startswith("gradients: ") for note in pruned.report.notes):
        return ""
    analysis = pruned.compiled.prepared.analysis
    cut, small = resolve_plan(analysis, pruned.plan), pruned.model
    oracle = zeroed(net, analysis, pruned.plan)
    for module in (oracle, small):
        module.zero_grad()
        tensors, _ = take_apart(module(given((3, 6))))
        generator = torch.Generator().manual_seed(0)
        loss = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in tensors)
        if isinstance(loss, Tensor) and loss.requires_grad:
            loss.backward()
    wanted = dict(oracle.named_parameters())
    largest = max((p.grad.abs().max().item() for p in wanted.values() if p.grad is not None), default=0.0)
    for name, parameter in small.named_parameters():
        if name not in analysis.weights:  # unused
            continue
        whole = wanted[name].grad if wanted[name].grad is not None else torch.zeros_like(wanted[name])
        expected = cut.slice(whole, analysis.weights[name])
        found = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        if not (found - expected).abs().max().item() <= 1e-3 * max(largest, 1e-6):
            return f"the gradient of {name} differs by {(found - expected).abs().max().item():.1e}, unsaid"
    return ""
