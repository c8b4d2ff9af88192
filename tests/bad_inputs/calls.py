"""Calls of the Python API with bad arguments: what is called, on what, and what the error is about."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mptk
from mptk import testing
from mptk.errors import (
    AnalysisError,
    BudgetError,
    DataError,
    FileError,
    InputError,
    KeywordError,
    MachineError,
    ModelError,
    OutputError,
    PlanError,
    TraceError,
)
from mptk.ir import Analysis

NAN = float("nan")
X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.arange(3, 51).view(2, 24)


def three(last: int = 4, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12, **options), nn.ReLU(), nn.Linear(12, last, **options)).eval()


class Two(nn.Module):
    """Takes two inputs, one of them ids."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.net = nn.Embedding(9, 8), three()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.net(x + self.table(ids))


class Unnamed(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        return tensors[0]


class Parts:
    """What calls are made with. Each is made once; none may be changed by a call."""

    def __init__(self, folders: dict[str, Path], root: Path) -> None:
        self.root, self.folders = root, folders
        self.module, self.two, self.model = three(), Two(), testing.make_llama(layers=1)
        self.tokenizer = testing.make_tokenizer()
        self.analysis: Analysis = mptk.analyze(self.module, (X,))
        pruned = mptk.prune(self.module, sparsity=0.5, example_inputs=X, progress=None)
        assert pruned is not None
        self.pruned: mptk.Pruned = pruned

    def plan(self, name: str = "channels", width: int = 6, of: int = 12, keep: Any = None) -> mptk.Plan:
        rows = (tuple(range(width)),) if keep is None else keep
        return mptk.Plan({name: mptk.FamilyPlan(width, of, {"": rows})})


@dataclass(frozen=True)
class Call:
    """``run``: makes the call. ``kind``, ``about``: the error's class and its ``name``; {root} is the folder of the calls.

    A TypeError if the call itself does not fit.
    """

    name: str
    run: Callable[[Parts], Any]
    kind: type[Exception]
    about: str = ""


def prune(parts: Parts, model: Any = None, **keywords: Any) -> Any:
    """A plain module, with good arguments where no others are given."""
    own = {"example_inputs": X, "sparsity": 0.5, "progress": None} | keywords
    return mptk.prune(parts.module if model is None else model, **own)


def lm(parts: Parts, **keywords: Any) -> Any:
    """A language model."""
    own = {"data": IDS, "method": "magnitude", "tolerance": 1.0, "samples": 2, "length": 24, "progress": None}
    return mptk.prune(parts.model, **own | {"tokenizer": parts.tokenizer} | keywords)


def generate(parts: Parts, **keywords: Any) -> Any:
    """Text after one word."""
    return mptk.generate(parts.model, "a", tokenizer=parts.tokenizer, **keywords)


def export(parts: Parts, **keywords: Any) -> Any:
    return mptk.export(parts.model, parts.root / "e", **keywords)


def settings(**keywords: Any) -> Callable[[Parts], Any]:
    return partial(prune, **keywords)


def inputs(given: Any) -> Callable[[Parts], Any]:
    return partial(prune, example_inputs=given)


def data(given: Callable[[], Any]) -> Callable[[Parts], Any]:
    return lambda parts: prune(parts, data=given())


def texts(given: Callable[[], Any]) -> Callable[[Parts], Any]:
    return lambda parts: lm(parts, data=given())


def closed() -> Iterator[Tensor]:
    found = (batch for batch in [X])
    found.close()
    return found


def with_value(value: float) -> Tensor:
    changed = X.clone()
    changed[0, 0, 0] = value
    return changed


def quantized() -> Tensor:
    return torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)


def quantized_module() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(three(), {nn.Linear})


META = testing.make_llama(layers=1).to("meta")
MODELS = [
    Call("a model of None", lambda p: mptk.prune(None, progress=None), InputError, "model"),
    Call("a model that is a class", lambda p: mptk.prune(nn.Linear, progress=None), InputError, "model"),
    Call("a path to nowhere", lambda p: mptk.prune(p.root / "no", progress=None), FileError, "{root}/no"),
    Call("an empty name", lambda p: mptk.prune("", progress=None), InputError),
    Call("a module without parameters", lambda p: prune(p, nn.ReLU()), AnalysisError),
    Call("a module on the meta device", lambda p: prune(p, three(device="meta")), ModelError, "Sequential"),
    Call("a decoder on the meta device", lambda p: mptk.prune(META), ModelError, "LlamaForCausalLM"),
    Call("a quantised module", lambda p: prune(p, quantized_module()), ModelError, "Sequential"),
    Call("a module with NaN", lambda p: prune(p, _filled(NAN)), ModelError, "0.weight"),
    Call("a module of zeros", lambda p: prune(p, _filled(0.0)), ModelError, "Sequential"),
    Call("a module without a forward", lambda p: prune(p, nn.ModuleList([nn.Linear(8, 4)])), TraceError, "ModuleList"),
    Call("no example inputs", lambda p: mptk.prune(p.module, progress=None), InputError, "example_inputs"),
    Call("a sparse weight", lambda p: prune(p, _sparse()), ModelError, "Sequential"),
    Call("a lazy module", lambda p: prune(p, nn.Sequential(nn.LazyLinear(4))), ModelError, "Sequential"),
]


def _filled(value: float) -> nn.Module:
    module = three()
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)
    return module


def _sparse() -> nn.Module:
    module = three()
    module[0].weight = nn.Parameter(module[0].weight.detach().to_sparse(), requires_grad=False)
    return module


INPUTS = [
    Call("example inputs that are a number", inputs(7), InputError, "example_inputs"),
    Call("example inputs that are empty", inputs(()), DataError, "example inputs"),
    Call("example inputs that are a list of lists", inputs([[1.0, 2.0]]), InputError, "example_inputs"),
    Call("example inputs of NumPy", inputs(X.numpy()), InputError, "example_inputs"),
    Call("example inputs of no dimension", inputs(torch.tensor(1.0)), DataError, "example inputs"),
    Call("example inputs of no sample", inputs(X[:0]), DataError, "example inputs"),
    Call("example inputs of another width", inputs(X[..., :5]), TraceError, "Sequential"),
    Call("example inputs of another type", inputs(X.long()), DataError, "example_inputs"),
    Call("example inputs that are too many", inputs((X, X)), InputError, "example_inputs"),
    Call("example inputs of an unknown name", inputs({"y": X}), TraceError, "Sequential"),
    Call("ragged example inputs", lambda p: prune(p, p.two, example_inputs=(X, IDS)), DataError, "example inputs"),
    Call("example inputs that are too few", lambda p: prune(p, p.two, example_inputs=X), TraceError, "Two"),
    Call("example inputs of NaN", inputs(with_value(NAN)), DataError, "input"),
    Call("example inputs on the meta device", inputs(X.to("meta")), DataError, "input"),
    Call("example inputs that are sparse", inputs(X.to_sparse()), DataError, "input"),
    Call("example inputs that are quantized", lambda p: prune(p, example_inputs=quantized()), DataError, "input"),
    Call("example inputs without names", lambda p: prune(p, Unnamed(), example_inputs=(X, X)), ModelError, "forward"),
    Call("example inputs twice", settings(inputs="x.safetensors"), InputError, "example_inputs"),
    Call("no inputs file", settings(example_inputs=None, inputs="no.safetensors"), FileError, "no.safetensors"),
]
DATA = [
    Call("data that is a number", data(lambda: 7), InputError, "data"),
    Call("data that is empty", data(list), DataError, "data"),
    Call("data that is a closed generator", data(closed), DataError, "data"),
    Call("data of no samples", data(lambda: X[:0]), DataError, "data"),
    Call("data of another rank", data(lambda: X[0, 0]), DataError, "input"),
    Call("data of another width", data(lambda: X[..., :5]), DataError, "data"),
    Call("data of whole numbers", data(X.long), DataError, "input"),
    Call("data of ragged batches", data(lambda: [X, X[:, :3]]), DataError, "data"),
    Call("data of another name", data(lambda: {"y": X}), DataError, "input"),
    Call("data of strings in a dict", data(lambda: {"input": ["a"]}), DataError, "input"),
    Call("data of NaN", data(lambda: with_value(NAN)), DataError, "input"),
    Call("data of infinity", data(lambda: with_value(float("inf"))), DataError, "input"),
    Call("data that is quantized", data(quantized), DataError, "input"),
    Call("data of None", data(lambda: [None, None]), DataError, "data"),
    Call("data of a batch of nothing", data(lambda: [()]), DataError, "input"),
    Call("data in a loader of labels", data(lambda: DataLoader(TensorDataset(torch.arange(4)))), DataError, "input"),
    Call("data of Samples of nothing", data(lambda: mptk.Samples({})), DataError, "data"),
    Call("data of Samples of lists", data(lambda: mptk.Samples({"input": [[1.0]]})), DataError, "input"),
    Call("data of text for a module", data(lambda: ["some text"]), InputError, "tokenizer"),
    Call("text of a file that is not there", texts(lambda: Path("no.txt")), FileError, "no.txt"),
    Call("text that is empty", texts(lambda: ["", ""]), DataError, "data"),
    Call("text that is bytes", texts(lambda: [b"some text"]), DataError, "data"),
    Call("text without a tokenizer", lambda p: lm(p, tokenizer=None, data=["a text"]), InputError, "tokenizer"),
    Call("text that is too short", texts(lambda: ["a b"]), DataError, "data"),
    Call("ids beyond the vocabulary", texts(lambda: IDS + 300), DataError, "input_ids"),
    Call("ids below zero", texts(lambda: IDS - 9), DataError, "input_ids"),
    Call("ids that are floats", texts(IDS.float), DataError, "input_ids"),
    Call("ids of no tokens", texts(lambda: IDS[:, :0]), DataError, "input_ids"),
    Call("ids of three dimensions", texts(lambda: IDS[None]), DataError, "input_ids"),
    Call("ids longer than the positions", texts(lambda: IDS.repeat(1, 4)), InputError, "96 tokens of data"),
]
WRONG = {
    "sparsity": (-0.1, 1, 10**400, NAN, float("inf"), "half", True, torch.tensor(0.5), None),
    "samples": (2.5, True, 0),
    "seed": (-1, "0"),
    "method": (7, None, "maskprune"),
    "budget": ("size",),
    "families": (("channels", "channels"), 7, (1, 2), b"channels"),
    "widths": ([6], {"channels": "6"}),
    "portable": ("no",),
    "onnx": (3,),
    "steps": (3,),
    "lr": ("1e-4",),
    "settings": ({"sparsity": 0.5},),
    "learning": ({"steps": 1},),
    "device": ("tpu", 0),
    "memory": ("8GB",),
    "plan": (3,),
    "progress": ("bars",),
    "on_stage": (3,),
    "out": (7, b"o"),
}
"""Keyword → values that are wrong for a plain module; the error is about the keyword."""
SETTINGS = [
    *(
        Call(f"{keyword} {str(value)[:20]!r}", settings(**{keyword: value}), InputError, keyword)
        for keyword, values in WRONG.items()
        for value in values
    ),
    Call("an unknown keyword", settings(sparcity=0.5), KeywordError, "sparcity"),
    Call("an unknown method", settings(method="wonda"), InputError, "wonda"),
    Call("an unknown target", settings(target="onix"), InputError, "onix"),
    Call("a family that is not there", settings(families="ffn"), InputError, "ffn"),
    Call("a family kept and cut", settings(families="channels", keep="channels"), InputError, "keep"),
    Call("a width that is too large", settings(widths={"channels": 99}), BudgetError, "channels"),
    Call("a plan that is not there", settings(plan="no.json"), PlanError, "no.json"),
    Call("an output that is empty", settings(out=""), OutputError, "."),
    Call("a tokenizer that is a string", lambda p: lm(p, tokenizer="t"), InputError, "tokenizer"),
    Call("a vocabulary that is a number", lambda p: lm(p, vocabulary=7), InputError, "vocabulary"),
    Call("no model at all", lambda p: mptk.prune(), TypeError),
]


def _rewrite(**plan: Any) -> Callable[[Parts], Any]:
    return lambda p: mptk.rewrite(p.analysis, p.plan(**plan))


COMPILER = [
    Call("analyze nothing known", lambda p: mptk.analyze(p.module), InputError, "example_inputs"),
    Call("analyze with a list of numbers", lambda p: mptk.analyze(p.module, [1, 2]), InputError, "example_inputs"),
    Call("analyze with another rank", lambda p: mptk.analyze(p.module, X[0, 0, :3]), TraceError, "Sequential"),
    Call("trace with a word for a flag", lambda p: mptk.trace(p.module, (X,), dynamic="yes"), InputError, "dynamic"),
    Call("show after no pass", lambda p: mptk.show(p.module, (X,), after="cut", plan=p.plan()), InputError, "cut"),
    Call("show after a pass without a plan", lambda p: mptk.show(p.module, (X,), after="rewrite"), InputError, "plan"),
    Call("rewrite a module", lambda p: mptk.rewrite(p.module, p.plan()), InputError, "analysis"),
    Call("rewrite with a dict", lambda p: mptk.rewrite(p.analysis, {"channels": 6}), InputError, "plan"),
    Call("rewrite a plan of another model", _rewrite(name="ffn"), PlanError, "ffn"),
    Call("rewrite a plan of another width", _rewrite(of=20), PlanError, "channels"),
    Call("rewrite a plan of no units", _rewrite(width=0), PlanError, "channels"),
    Call("rewrite a plan of a unit twice", _rewrite(width=2, keep=((3, 3),)), PlanError, "plan: channels."),
    Call("rewrite a plan of units in another order", _rewrite(width=2, keep=((3, 1),)), PlanError, "plan: channels."),
    Call("rewrite a plan of units below", _rewrite(width=2, keep=((-1, 3),)), PlanError, "plan: channels."),
    Call("rewrite a plan of units beyond", _rewrite(width=2, keep=((3, 30),)), PlanError, "plan: channels."),
    Call("rewrite a plan of fractions", _rewrite(width=2, keep=((0.5, 3),)), PlanError, "plan: channels."),
    Call("rewrite a plan without layers", lambda p: mptk.rewrite(p.analysis, _of_layers({})), PlanError, "channels"),
    Call("rewrite a plan of rows in a list", _rewrite(keep=3), PlanError, "channels"),
]


def _of_layers(keep: Any) -> mptk.Plan:
    return mptk.Plan({"channels": mptk.FamilyPlan(6, 12, keep)})


SEVEN = {
    "model": (mptk.analyze, mptk.show, mptk.load, mptk.shapes, mptk.prune),
    "folder": (mptk.Pruned.open, mptk.verify),
    "pruned": (mptk.recover,),
    "alias": (mptk.fetch,),
}
"""What a number is given to, by what the error is about."""
USE = [
    *(
        Call(f"{call.__name__} 7", lambda p, call=call: call(7), InputError, about)
        for about, calls in SEVEN.items()
        for call in calls
    ),
    Call("evaluate 7", lambda p: mptk.evaluate(7, IDS), InputError, "model"),
    Call("generate 7", lambda p: mptk.generate(7, "a"), InputError, "model"),
    Call("export 7", lambda p: mptk.export(7, p.root / "e"), InputError, "model"),
    Call("bench [7]", lambda p: mptk.bench([7]), InputError, "models"),
    Call("export to 7", lambda p: mptk.export(p.model, 7), InputError, "folder"),
    Call("save to 7", lambda p: p.pruned.save(7), InputError, "folder"),
    Call("open nowhere", lambda p: mptk.Pruned.open(p.root / "no"), FileError, "{root}/no"),
    Call("open a model", lambda p: mptk.Pruned.open(p.folders["model"]), FileError, "{tiny}/model"),
    Call("save onto a folder of others", lambda p: p.pruned.save(p.folders["model"]), OutputError, "{tiny}/model"),
    Call("save below a file", lambda p: p.pruned.save(p.folders["text.raw"] / "o"), OutputError, "{tiny}/text.raw/o"),
    Call("recover nowhere", lambda p: mptk.recover(p.root / "no"), FileError, "{root}/no"),
    Call("recover to another sparsity", lambda p: mptk.recover(p.pruned, sparsity=0.2), InputError, "sparsity"),
    Call("recover with an unknown keyword", lambda p: mptk.recover(p.pruned, stepps=2), KeywordError, "stepps"),
    Call("recover in words", lambda p: mptk.recover(p.pruned, steps="two"), InputError, "steps"),
    Call("verify a model", lambda p: mptk.verify(p.folders["model"]), FileError, "{tiny}/model"),
    Call("verify against a number", lambda p: mptk.verify(p.folders["pruned"], model=7), InputError, "model"),
    Call("verify in no tokens", lambda p: mptk.verify(p.folders["pruned"], proof_length=3), InputError, "proof_length"),
    Call("verify against a module", lambda p: mptk.verify(p.folders["pruned"], model=p.module), InputError, "model"),
    Call("evaluate on nothing", lambda p: mptk.evaluate(p.model), InputError, "data"),
    Call("evaluate on a number", lambda p: mptk.evaluate(p.model, 7), InputError, "data"),
    Call("evaluate on no windows", lambda p: mptk.evaluate(p.model, IDS, windows=0), InputError, "eval_windows"),
    Call("evaluate on words for windows", lambda p: mptk.evaluate(p.model, IDS, windows="2"), InputError, "windows"),
    Call("evaluate without a tokenizer", lambda p: mptk.evaluate(p.model, ["a text"]), InputError, "tokenizer"),
    Call("evaluate ids beyond", lambda p: mptk.evaluate(p.model, IDS + 300, progress=None), DataError, "input_ids"),
    Call("evaluate only a module", lambda p: mptk.evaluate(p.module, X, example_inputs=X), InputError, "dense"),
    Call("generate after numbers", lambda p: mptk.generate(p.model, [7], tokenizer=p.tokenizer), InputError, "prompts"),
    Call("generate without a tokenizer", lambda p: mptk.generate(p.model, "a"), InputError, "tokenizer"),
    Call("generate in a cold", lambda p: generate(p, temperature=-1.0), InputError, "temperature"),
    Call("generate no tokens", lambda p: generate(p, max_new_tokens=0), InputError, "max_new_tokens"),
    Call("generate words for tokens", lambda p: generate(p, max_new_tokens="9"), InputError, "max_new_tokens"),
    Call("text of a module", lambda p: mptk.generate(p.module, "a", tokenizer=p.tokenizer), ModelError, "Sequential"),
    Call("export a module", lambda p: mptk.export(p.module, p.root / "e"), InputError, "example_inputs"),
    Call("export in an unknown scheme", lambda p: export(p, quantize=("int3",)), InputError, "quantize"),
    Call("export some logits", lambda p: export(p, logits="some"), InputError, "logits"),
    Call("export by a path for a plan", lambda p: export(p, plan="p.json"), InputError, "plan"),
    Call("bench nothing", lambda p: mptk.bench([]), InputError, "models"),
    Call("bench one name", lambda p: mptk.bench("model"), InputError, "models"),
    Call("bench lengths in words", lambda p: mptk.bench([p.folders["gpt2"]], lengths=("a",)), InputError, "lengths"),
    Call("load a path to nowhere", lambda p: mptk.load(str(p.root / "no")), FileError, "{root}/no"),
    Call("load as no float", lambda p: mptk.load(str(p.folders["model"]), dtype="float32"), InputError, "dtype"),
    Call("fetch an unknown alias", lambda p: mptk.fetch("smollm9"), InputError, "smollm9"),
    Call(
        "shapes of no number", lambda p: mptk.shapes(p.module, example_inputs=X, sparsity="x"), InputError, "sparsity"
    ),
    Call("a rule of no op", lambda p: mptk.rule(7)(print), InputError, "ops"),
    Call("a rule of an unknown zero", lambda p: mptk.rule("my::op", zero="some")(print), InputError, "zero"),
]
LONG, NULL = "a" * 300, "a\0b"
IN_USE = [
    *(
        Call(f"{call.__qualname__} of a long name", lambda p, call=call: call(LONG), InputError, LONG)
        for call in (mptk.Pruned.open, mptk.prune, mptk.verify, mptk.Report.read)
    ),
    Call("generate from a long name", lambda p: mptk.generate(LONG, "a"), InputError, LONG),
    Call("a long out", lambda p: prune(p, out=LONG), OutputError, f"{{root}}/{LONG}"),
    Call("a long folder to save", lambda p: p.pruned.save(LONG), OutputError, f"{{root}}/{LONG}"),
    Call("evaluate a long name", lambda p: mptk.evaluate(LONG, X, progress=None), InputError, f"{LONG}/report.json"),
    Call("a null character in out", lambda p: prune(p, out=NULL), OutputError, "a\u0000b"),
    Call("a current folder that was removed", lambda p: _without_current_folder(p), OutputError, "relative"),
    Call("no folder for temporary files", lambda p: _without_temporary_folder(p), MachineError, "{root}/gone"),
    Call("export with a misspelt keyword", lambda p: export(p, quantise=["int8"]), InputError, "quantise"),
    Call(
        "export a module with a tokenizer",
        lambda p: mptk.export(p.module, "e", example_inputs=X, tokenizer=p.tokenizer),
        InputError,
        "tokenizer",
    ),
]


def _without_current_folder(parts: Parts) -> None:
    here = Path.cwd()
    place = parts.root / "short-lived"
    place.mkdir()
    os.chdir(place)
    place.rmdir()
    try:
        prune(parts, out="relative")
    finally:
        os.chdir(here)


def _without_temporary_folder(parts: Parts) -> None:
    before, tempfile.tempdir = tempfile.tempdir, str(parts.root / "gone")
    try:
        prune(parts)
    finally:
        tempfile.tempdir = before


CALLS = [*MODELS, *INPUTS, *DATA, *SETTINGS, *COMPILER, *USE, *IN_USE]
