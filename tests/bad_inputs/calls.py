"""Calls of the Python API with bad arguments: what is called, on what, and what the error must say."""

from __future__ import annotations

import copy
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mptk
from mptk import testing
from mptk.ir.families import Analysis

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
        self.module, self.two, self.model = three(), Two(), testing.make_llama()
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
    """``run``: makes the call. ``says``: words of its error. ``kind``: a TypeError if the call itself does not fit."""

    name: str
    run: Callable[[Parts], Any]
    says: tuple[str, ...]
    kind: type[Exception] = field(default=mptk.MptkError)


def prune(parts: Parts, model: Any = None, **keywords: Any) -> Any:
    """A plain module, with good arguments where no others are given."""
    own = {"example_inputs": X, "sparsity": 0.5, "progress": None} | keywords
    return mptk.prune(parts.module if model is None else model, **own)


def lm(parts: Parts, **keywords: Any) -> Any:
    """A language model."""
    own = {
        "data": IDS,
        "method": "magnitude",
        "tolerance": 1.0,
        "progress": None,
        "samples": 2,
        "length": 24,
    } | keywords
    return mptk.prune(parts.model, **{"tokenizer": parts.tokenizer} | own)


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


MODELS = [
    Call("a model of None", lambda p: mptk.prune(None, progress=None), ("model is None",)),
    Call("a model that is a number", lambda p: mptk.prune(7, progress=None), ("model is 7",)),
    Call("a model that is bytes", lambda p: mptk.prune(b"model", progress=None), ("model is",)),
    Call("a model that is a list", lambda p: mptk.prune([p.module], progress=None), ("model is a list",)),
    Call("a model that is a class", lambda p: mptk.prune(nn.Linear, progress=None), ("model is a type",)),
    Call("a model that is a function", lambda p: mptk.prune(torch.relu, progress=None), ("model is a",)),
    Call("a path to nowhere", lambda p: mptk.prune(p.root / "no" / "model", progress=None), ("no", "model")),
    Call("an empty name", lambda p: mptk.prune("", progress=None), ("model",)),
    Call("a module without parameters", lambda p: prune(p, nn.ReLU()), ("it has no weights",)),
    Call("a module on the meta device", lambda p: prune(p, three(device="meta")), ("not in memory",)),
    Call("a model on the meta device", lambda p: mptk.prune(testing.make_llama().to("meta")), ("not in memory",)),
    Call("a module that raises", lambda p: prune(p, nn.Sequential(nn.Linear(3, 4))), ("cannot trace Sequential",)),
    Call("a quantised module", lambda p: prune(p, quantized_module()), ("quantised",)),
    Call("a module with NaN", lambda p: prune(p, _filled(float("nan"))), ("0.weight", "not finite")),
    Call("a module of zeros", lambda p: prune(p, _filled(0.0)), ("all zero",)),
    Call("a module without a forward", lambda p: prune(p, nn.ModuleList([nn.Linear(8, 4)])), ("ModuleList",)),
    Call("a module without example inputs", lambda p: mptk.prune(p.module, progress=None), ("give example_inputs",)),
    Call("a sparse weight", lambda p: prune(p, _sparse()), ("sparse",)),
    Call("a lazy module", lambda p: prune(p, nn.Sequential(nn.LazyLinear(4))), ("run it once",)),
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
    Call("example inputs that are a number", inputs(7), ("example_inputs is 7",)),
    Call("example inputs that are a string", inputs("x"), ("example_inputs is 'x'",)),
    Call("example inputs that are empty", inputs(()), ("example inputs",)),
    Call("example inputs that are an empty dict", inputs({}), ("example inputs",)),
    Call("example inputs that are a list of lists", inputs([[1.0, 2.0]]), ("example_inputs.0 is a list",)),
    Call("example inputs of NumPy", inputs(X.numpy()), ("example_inputs is a ndarray",)),
    Call("example inputs in a dict of NumPy", inputs({"input": X.numpy()}), ("example_inputs.input is a ndarray",)),
    Call("example inputs of no dimension", inputs(torch.tensor(1.0)), ("samples in their first dimension",)),
    Call("example inputs of no sample", inputs(X[:0]), ("samples in their first dimension",)),
    Call("example inputs of another width", inputs(X[..., :5]), ("cannot trace Sequential",)),
    Call("example inputs of another type", inputs(X.long()), ("does not run on its example inputs",)),
    Call("example inputs that are too many", inputs((X, X)), ("2 inputs by position and 1 names",)),
    Call("example inputs of an unknown name", inputs({"y": X}), ("cannot trace", "y")),
    Call("example inputs of ragged numbers", lambda p: prune(p, p.two, example_inputs=(X, IDS)), ("all as many",)),
    Call("example inputs that are too few", lambda p: prune(p, p.two, example_inputs=X), ("cannot trace Two",)),
    Call("example inputs of NaN", inputs(with_value(float("nan"))), ("input", "NaN")),
    Call("example inputs on the meta device", inputs(X.to("meta")), ("input", "meta")),
    Call("example inputs that are sparse", inputs(X.to_sparse()), ("input", "sparse")),
    Call("example inputs that are quantized", inputs(quantized()), ("input", "quantized")),
    Call("example inputs without names", lambda p: prune(p, Unnamed(), example_inputs=(X, X)), ("by *args", "named")),
    Call("example inputs twice", settings(inputs="x.safetensors"), ("twice",)),
    Call("an inputs file that is not there", settings(example_inputs=None, inputs="no.safetensors"), ("cannot read",)),
]
DATA = [
    Call("data that is a number", data(lambda: 7), ("data is 7",)),
    Call("data that is empty", data(list), ("data",)),
    Call("data that is a closed generator", data(closed), ("data",)),
    Call("data that is an empty generator", data(lambda: iter(())), ("data",)),
    Call("data of no samples", data(lambda: X[:0]), ("input", "[0, 5, 8]")),
    Call("data of another rank", data(lambda: X[0, 0]), ("input", "[8]")),
    Call("data of another width", data(lambda: X[..., :5]), ("input",)),
    Call("data of whole numbers", data(X.long), ("input", "float32", "int64")),
    Call("data of ragged batches", data(lambda: [X, X[:, :3]]), ("data has a wrong form",)),
    Call("data of another name", data(lambda: {"y": X}), ("'input'", "lack")),
    Call("data of strings in a dict", data(lambda: {"input": ["a"]}), ("not a tensor but list",)),
    Call("data of NaN", data(lambda: with_value(float("nan"))), ("input", "NaN")),
    Call("data of infinity", data(lambda: with_value(float("inf"))), ("input", "inf")),
    Call("data on the meta device", data(lambda: X.to("meta")), ("input", "meta")),
    Call("data that is sparse", data(X.to_sparse), ("input", "sparse")),
    Call("data that is quantized", data(quantized), ("input", "quantized")),
    Call("data of None", data(lambda: [None, None]), ("data",)),
    Call("data of numbers", data(lambda: [1.0, 2.0]), ("data",)),
    Call("data of a batch of nothing", data(lambda: [()]), ("data",)),
    Call("data in a loader of labels", data(lambda: DataLoader(TensorDataset(torch.arange(4)))), ("input",)),
    Call("data of Samples of another name", data(lambda: mptk.Samples({"y": X})), ("'input'",)),
    Call("data of Samples of nothing", data(lambda: mptk.Samples({})), ("'input'",)),
    Call("data of Samples of lists", data(lambda: mptk.Samples({"input": [[1.0]]})), ("not a tensor but list",)),
    Call("data of text for a module", data(lambda: ["some text"]), ("tokenizer",)),
    Call("text of a file that is not there", texts(lambda: Path("no.txt")), ("no.txt",)),
    Call("text that is empty", texts(lambda: ["", ""]), ("text",)),
    Call("text that is bytes", texts(lambda: [b"some text"]), ("holds bytes",)),
    Call(
        "text without a tokenizer",
        lambda p: lm(p, tokenizer=None, data=["a text"]),
        ("no tokenizer to read texts with",),
    ),
    Call("text beside a number", texts(lambda: ["some text", 7]), ("mixes strings with other values",)),
    Call("text that is too short", texts(lambda: ["a b"]), ("too few",)),
    Call("ids beyond the vocabulary", texts(lambda: IDS + 300), ("input_ids", "300")),
    Call("ids below zero", texts(lambda: IDS - 9), ("input_ids", "-")),
    Call("ids that are floats", texts(IDS.float), ("input_ids",)),
    Call("ids of no tokens", texts(lambda: IDS[:, :0]), ("input_ids",)),
    Call("ids of three dimensions", texts(lambda: IDS[None]), ("input_ids",)),
    Call("ids longer than the positions", texts(lambda: IDS.repeat(1, 4)), ("70 positions",)),
]
SETTINGS = [
    Call("an unknown keyword", settings(sparcity=0.5), ("sparcity", "'sparsity'")),
    Call("a keyword like no other", settings(qqq=1), ("'qqq'", "help")),
    Call("a negative sparsity", settings(sparsity=-0.1), ("sparsity", "less than 0")),
    Call("a sparsity of one", settings(sparsity=1), ("sparsity", "0.99")),
    Call("a huge sparsity", settings(sparsity=10**400), ("sparsity", "many digits")),
    Call("a sparsity of NaN", settings(sparsity=float("nan")), ("sparsity", "not a finite number")),
    Call("a sparsity of infinity", settings(sparsity=float("inf")), ("sparsity", "not a finite number")),
    Call("a sparsity that is a string", settings(sparsity="0.5"), ("sparsity is '0.5'",)),
    Call("a sparsity that is a bool", settings(sparsity=True), ("sparsity is True",)),
    Call("a sparsity that is a tensor", settings(sparsity=torch.tensor(0.5)), ("sparsity is",)),
    Call("a sparsity of None", settings(sparsity=None), ("sparsity is None",)),
    Call("samples that are a float", settings(samples=2.5), ("samples is 2.5",)),
    Call("samples that are a bool", settings(samples=True), ("samples is True",)),
    Call("no samples", settings(samples=0), ("samples", "less than 1")),
    Call("a seed below zero", settings(seed=-1), ("seed", "less than 0")),
    Call("a seed that is a string", settings(seed="0"), ("seed is '0'",)),
    Call("an unknown method", settings(method="wonda"), ("wonda", "wanda")),
    Call("a method that is a number", settings(method=7), ("method is 7",)),
    Call("a method of None", settings(method=None), ("method is None",)),
    Call("an unknown target", settings(target="onix"), ("onix",)),
    Call("an unknown budget", settings(budget="size"), ("size",)),
    Call("a family that is not there", settings(families="ffn"), ("no family 'ffn'", "channels")),
    Call("families twice", settings(families=("channels", "channels")), ("channels", "twice")),
    Call("families that are a number", settings(families=7), ("families is 7",)),
    Call("families of numbers", settings(families=(1, 2)), ("families.0 is 1",)),
    Call("families that are bytes", settings(families=b"channels"), ("families is",)),
    Call("a family kept and cut", settings(families="channels", keep="channels"), ("keep",)),
    Call("widths that are a list", settings(widths=[6]), ("widths is a list",)),
    Call("widths that are strings", settings(widths={"channels": "6"}), ("widths.channels is '6'",)),
    Call("a width of zero", settings(widths={"channels": 0}), ("channels cannot have width 0",)),
    Call("a width that is too large", settings(widths={"channels": 99}), ("channels cannot have width 99",)),
    Call("a flag that is a string", settings(portable="no"), ("portable is 'no'",)),
    Call("a flag that is a number", settings(onnx=3), ("onnx is 3",)),
    Call("masks for a module", settings(method="maskprune"), ("maskprune trains only transformers models",)),
    Call("steps for a module", settings(steps=3), ("train Pruned.model yourself",)),
    Call("a learning rate that is a string", settings(lr="1e-4"), ("lr is '1e-4'",)),
    Call("settings that are a dict", settings(settings={"sparsity": 0.5}), ("settings is a dict",)),
    Call("a learning that is a dict", settings(learning={"steps": 1}), ("learning is a dict",)),
    Call("a device that is not there", settings(device="tpu"), ("tpu",)),
    Call("a device that is a number", settings(device=0), ("device is 0",)),
    Call("memory that is a string", settings(memory="8GB"), ("memory is '8GB'",)),
    Call("a plan that is not there", settings(plan="no.json"), ("no.json",)),
    Call("a plan that is a number", settings(plan=3), ("plan is 3",)),
    Call("progress that is a string", settings(progress="bars"), ("progress is 'bars'",)),
    Call("on_stage that is no function", settings(on_stage=3), ("on_stage is 3",)),
    Call("an output that is a number", settings(out=7), ("out is 7",)),
    Call("an output that is bytes", settings(out=b"o"), ("out is",)),
    Call("an output that is empty", settings(out=""), ("not a name of a folder",)),
    Call("a tokenizer that is a string", lambda p: lm(p, tokenizer="t"), ("tokenizer is 't'",)),
    Call("a vocabulary that is a number", lambda p: lm(p, vocabulary=7), ("vocabulary is 7",)),
    Call("a second positional settings", lambda p: mptk.prune(p.module, None, None, 0.5), ("positional",), TypeError),
    Call("no model at all", lambda p: mptk.prune(), ("model",), TypeError),
]


def _rewrite(**plan: Any) -> Callable[[Parts], Any]:
    return lambda p: mptk.rewrite(p.analysis, p.plan(**plan))


COMPILER = [
    Call("analyze a number", lambda p: mptk.analyze(7), ("model is 7",)),
    Call("analyze nothing known", lambda p: mptk.analyze(p.module), ("example inputs",)),
    Call("analyze with a number", lambda p: mptk.analyze(p.module, 7), ("example_inputs is 7",)),
    Call("analyze with a list of numbers", lambda p: mptk.analyze(p.module, [1, 2]), ("example_inputs.0 is 1",)),
    Call(
        "analyze with a bare tensor of another rank", lambda p: mptk.analyze(p.module, X[0, 0, :3]), ("cannot trace",)
    ),
    Call("trace with a word for a flag", lambda p: mptk.trace(p.module, (X,), dynamic="yes"), ("dynamic is 'yes'",)),
    Call("show after nothing known", lambda p: mptk.show(p.module, (X,), after="cut", plan=p.plan()), ("cut",)),
    Call("show after a pass without a plan", lambda p: mptk.show(p.module, (X,), after="rewrite"), ("after and plan",)),
    Call("show of a number", lambda p: mptk.show(7), ("model is 7",)),
    Call("rewrite a module", lambda p: mptk.rewrite(p.module, p.plan()), ("analysis is a Sequential",)),
    Call("rewrite with a path", lambda p: mptk.rewrite(p.analysis, "plan.json"), ("plan is 'plan.json'", "Plan")),
    Call("rewrite with None", lambda p: mptk.rewrite(p.analysis, None), ("plan is None",)),
    Call("rewrite with a dict", lambda p: mptk.rewrite(p.analysis, {"channels": 6}), ("plan is a dict",)),
    Call("rewrite a plan of another model", _rewrite(name="ffn"), ("ffn",)),
    Call("rewrite a plan of another width", _rewrite(of=20), ("channels", "12")),
    Call("rewrite a plan of no units", _rewrite(width=0), ("channels",)),
    Call("rewrite a plan of a unit twice", _rewrite(width=2, keep=((3, 3),)), ("channels",)),
    Call("rewrite a plan of units in another order", _rewrite(width=2, keep=((3, 1),)), ("channels",)),
    Call("rewrite a plan of units beyond", _rewrite(width=2, keep=((3, 30),)), ("channels",)),
    Call("rewrite a plan of units below", _rewrite(width=2, keep=((-1, 3),)), ("channels",)),
    Call("rewrite a plan of words", _rewrite(width=2, keep=(("a", "b"),)), ("channels",)),
    Call("rewrite a plan of fractions", _rewrite(width=2, keep=((0.5, 3),)), ("channels",)),
    Call("rewrite a plan without layers", lambda p: mptk.rewrite(p.analysis, _of_layers({})), ("channels",)),
    Call("rewrite a plan of rows in a list", _rewrite(keep=3), ("channels",)),
    Call("a plan's file that is not there", lambda p: mptk.Plan.load(p.root / "no.json"), ("no.json",)),
    Call("a plan that is a folder", lambda p: mptk.Plan.load(p.root), ("cannot read plan",)),
]


def _of_layers(keep: Any) -> mptk.Plan:
    return mptk.Plan({"channels": mptk.FamilyPlan(6, 12, keep)})


USE = [
    Call("open a number", lambda p: mptk.Pruned.open(7), ("folder is 7",)),
    Call("open nowhere", lambda p: mptk.Pruned.open(p.root / "no"), ("no",)),
    Call("open a model", lambda p: mptk.Pruned.open(p.folders["model"]), ("report.json",)),
    Call("save to a number", lambda p: p.pruned.save(7), ("folder is 7",)),
    Call("save onto a folder of others", lambda p: p.pruned.save(p.folders["model"]), ("was not made by mptk",)),
    Call("save below a file", lambda p: p.pruned.save(p.folders["text.raw"] / "o"), ("text.raw",)),
    Call("recover a number", lambda p: mptk.recover(7), ("pruned is 7",)),
    Call("recover nowhere", lambda p: mptk.recover(p.root / "no"), ("no",)),
    Call(
        "recover to another sparsity",
        lambda p: mptk.recover(p.pruned, sparsity=0.2),
        ("recover cannot change sparsity",),
    ),
    Call("recover with an unknown keyword", lambda p: mptk.recover(p.pruned, stepps=2), ("stepps", "'steps'")),
    Call("recover in words", lambda p: mptk.recover(p.pruned, steps="two"), ("steps is 'two'",)),
    Call("recover a module", lambda p: mptk.recover(p.module), ("pruned is a Sequential",)),
    Call("verify a number", lambda p: mptk.verify(7), ("folder is 7",)),
    Call("verify a model", lambda p: mptk.verify(p.folders["model"]), ("plan.json",)),
    Call("verify against a number", lambda p: mptk.verify(p.folders["pruned"], model=7), ("model is 7",)),
    Call("verify in no tokens", lambda p: mptk.verify(p.folders["pruned"], proof_length=3), ("proof_length", "48")),
    Call(
        "verify against another model",
        lambda p: mptk.verify(p.folders["pruned"], model=p.module),
        ("pruned from files",),
    ),
    Call("evaluate a number", lambda p: mptk.evaluate(7, IDS), ("model is 7",)),
    Call("evaluate on nothing", lambda p: mptk.evaluate(p.model), ("give data",)),
    Call("evaluate on a number", lambda p: mptk.evaluate(p.model, 7), ("data is 7",)),
    Call("evaluate on no windows", lambda p: mptk.evaluate(p.model, IDS, windows=0), ("eval_windows", "less than 1")),
    Call("evaluate on words for windows", lambda p: mptk.evaluate(p.model, IDS, windows="2"), ("windows is '2'",)),
    Call("evaluate without a tokenizer", lambda p: mptk.evaluate(p.model, ["a text"]), ("tokenizer",)),
    Call("evaluate ids beyond", lambda p: mptk.evaluate(p.model, IDS + 300, progress=None), ("input_ids", "300")),
    Call(
        "evaluate a module alone",
        lambda p: mptk.evaluate(p.module, X, example_inputs=X),
        ("give the dense model as dense",),
    ),
    Call("generate from a number", lambda p: mptk.generate(7, "a"), ("model is 7",)),
    Call("generate after a number", lambda p: mptk.generate(p.model, 7, tokenizer=p.tokenizer), ("prompts is 7",)),
    Call("generate after numbers", lambda p: mptk.generate(p.model, [7], tokenizer=p.tokenizer), ("prompts.0 is 7",)),
    Call("generate without a tokenizer", lambda p: mptk.generate(p.model, "a"), ("tokenizer",)),
    Call(
        "generate in a cold",
        lambda p: mptk.generate(p.model, "a", tokenizer=p.tokenizer, temperature=-1.0),
        ("temperature",),
    ),
    Call(
        "generate no tokens",
        lambda p: mptk.generate(p.model, "a", tokenizer=p.tokenizer, max_new_tokens=0),
        ("tokens",),
    ),
    Call(
        "generate words for tokens",
        lambda p: mptk.generate(p.model, "a", tokenizer=p.tokenizer, max_new_tokens="9"),
        ("max_new_tokens is '9'",),
    ),
    Call("generate by a module", lambda p: mptk.generate(p.module, "a", tokenizer=p.tokenizer), ("Sequential",)),
    Call("export a number", lambda p: mptk.export(7, p.root / "e"), ("model is 7",)),
    Call("export to a number", lambda p: mptk.export(p.model, 7), ("folder is 7",)),
    Call("export a module", lambda p: mptk.export(p.module, p.root / "e"), ("Sequential",)),
    Call("export in an unknown scheme", lambda p: mptk.export(p.model, p.root / "e", quantize=("int3",)), ("int3",)),
    Call("export in an unknown type", lambda p: mptk.export(p.model, p.root / "e", onnx_dtype="f8"), ("f8",)),
    Call("export some logits", lambda p: mptk.export(p.model, p.root / "e", logits="some"), ("logits is 'some'",)),
    Call(
        "export by a path for a plan",
        lambda p: mptk.export(p.model, p.root / "e", plan="p.json"),
        ("plan is 'p.json'",),
    ),
    Call("bench nothing", lambda p: mptk.bench([]), ("models",)),
    Call("bench a number", lambda p: mptk.bench([7]), ("models.0 is 7",)),
    Call("bench one name", lambda p: mptk.bench("model"), ("models is 'model'",)),
    Call("bench lengths in words", lambda p: mptk.bench([p.folders["gpt2"]], lengths=("a",)), ("lengths",)),
    Call("load a number", lambda p: mptk.load(7), ("model is 7",)),
    Call("load a path to nowhere", lambda p: mptk.load(str(p.root / "no")), ("no",)),
    Call("load as no float", lambda p: mptk.load(str(p.folders["model"]), dtype="float32"), ("dtype is 'float32'",)),
    Call("fetch a number", lambda p: mptk.fetch(7), ("alias is 7",)),
    Call("fetch an unknown alias", lambda p: mptk.fetch("smollm9"), ("smollm9",)),
    Call("shapes of a number", lambda p: mptk.shapes(7), ("model is 7",)),
    Call(
        "shapes of a word for a number", lambda p: mptk.shapes(p.module, example_inputs=X, sparsity="x"), ("sparsity",)
    ),
    Call("a rule of no op", lambda p: mptk.rule(7)(print), ("ops.0 is 7",)),
    Call("a rule of an unknown zero", lambda p: mptk.rule("my::op", zero="some")(print), ("zero is 'some'",)),
]
LONG, NULL = "a" * 300, "a\0b"
IN_USE = [
    Call("a copy of a result", lambda p: copy.copy(p.pruned), ("save(DIR)", "Pruned.open")),
    Call("a deep copy of a result", lambda p: copy.deepcopy(p.pruned), ("save(DIR)", "Pruned.open")),
    Call("a pickle of a result", lambda p: pickle.dumps(p.pruned), ("save(DIR)", "Pruned.open")),
    Call("a long out", lambda p: prune(p, out=LONG), ("name too long", "give a shorter")),
    Call("a long folder to save", lambda p: p.pruned.save(LONG), ("name too long", "give a shorter")),
    Call("a long folder to open", lambda p: mptk.Pruned.open(LONG), ("name is too long", "give a shorter")),
    Call("a long model", lambda p: mptk.prune(LONG, progress=None), ("name too long", "cannot be a model's name")),
    Call("a long folder to verify", lambda p: mptk.verify(LONG), ("name is too long", "give a shorter")),
    Call("a long folder to measure", lambda p: mptk.evaluate(LONG, X, progress=None), ("name is too long",)),
    Call("a long folder to generate", lambda p: mptk.generate(LONG, "a"), ("name is too long", "give a shorter")),
    Call("a long report", lambda p: mptk.Report.read(LONG), ("name is too long", "give a shorter")),
    Call("a null character in out", lambda p: prune(p, out=NULL), ("cannot be a file's name", "null")),
    Call("a null character in save", lambda p: p.pruned.save(NULL), ("cannot be a file's name", "null")),
    Call("a current folder that was removed", lambda p: _without_current_folder(p), ("current folder was removed",)),
    Call("no folder for temporary files", lambda p: _without_temporary_folder(p), ("was removed", "TMPDIR")),
    Call(
        "a misspelt keyword of export",
        lambda p: mptk.export(p.module, "graph", example_inputs=X, quantise=["int8"]),
        ("export has no keyword quantise",),
    ),
    Call(
        "a tokenizer for a module",
        lambda p: mptk.export(p.module, "graph", example_inputs=X, tokenizer=p.tokenizer),
        ("reads no texts; leave out tokenizer",),
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
