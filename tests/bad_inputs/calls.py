"""Calls of the Python API with bad arguments: what is called, on what, and what the error is about."""

from __future__ import annotations

import copy
import os
import pickle
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
from mptk.ir import Analysis

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
    Call("a model of None", lambda p: mptk.prune(None, progress=None), mptk.InputError, "model"),
    Call("a model that is a number", lambda p: mptk.prune(7, progress=None), mptk.InputError, "model"),
    Call("a model that is bytes", lambda p: mptk.prune(b"model", progress=None), mptk.InputError, "model"),
    Call("a model that is a list", lambda p: mptk.prune([p.module], progress=None), mptk.InputError, "model"),
    Call("a model that is a class", lambda p: mptk.prune(nn.Linear, progress=None), mptk.InputError, "model"),
    Call("a model that is a function", lambda p: mptk.prune(torch.relu, progress=None), mptk.InputError, "model"),
    Call(
        "a path to nowhere",
        lambda p: mptk.prune(p.root / "no" / "model", progress=None),
        mptk.FileError,
        "{root}/no/model",
    ),
    Call("an empty name", lambda p: mptk.prune("", progress=None), mptk.InputError),
    Call("a module without parameters", lambda p: prune(p, nn.ReLU()), mptk.AnalysisError),
    Call("a module on the meta device", lambda p: prune(p, three(device="meta")), mptk.ModelError, "Sequential"),
    Call(
        "a model on the meta device",
        lambda p: mptk.prune(testing.make_llama(layers=1).to("meta")),
        mptk.ModelError,
        "LlamaForCausalLM",
    ),
    Call("a module that raises", lambda p: prune(p, nn.Sequential(nn.Linear(3, 4))), mptk.TraceError, "Sequential"),
    Call("a quantised module", lambda p: prune(p, quantized_module()), mptk.ModelError, "Sequential"),
    Call("a module with NaN", lambda p: prune(p, _filled(float("nan"))), mptk.ModelError, "0.weight"),
    Call("a module of zeros", lambda p: prune(p, _filled(0.0)), mptk.ModelError, "Sequential"),
    Call(
        "a module without a forward",
        lambda p: prune(p, nn.ModuleList([nn.Linear(8, 4)])),
        mptk.TraceError,
        "ModuleList",
    ),
    Call(
        "a module without example inputs",
        lambda p: mptk.prune(p.module, progress=None),
        mptk.InputError,
        "example_inputs",
    ),
    Call("a sparse weight", lambda p: prune(p, _sparse()), mptk.ModelError, "Sequential"),
    Call("a lazy module", lambda p: prune(p, nn.Sequential(nn.LazyLinear(4))), mptk.ModelError, "Sequential"),
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
    Call("example inputs that are a number", inputs(7), mptk.InputError, "example_inputs"),
    Call("example inputs that are a string", inputs("x"), mptk.InputError, "example_inputs"),
    Call("example inputs that are empty", inputs(()), mptk.DataError, "example inputs"),
    Call("example inputs that are an empty dict", inputs({}), mptk.DataError, "example inputs"),
    Call("example inputs that are a list of lists", inputs([[1.0, 2.0]]), mptk.InputError, "example_inputs"),
    Call("example inputs of NumPy", inputs(X.numpy()), mptk.InputError, "example_inputs"),
    Call("example inputs in a dict of NumPy", inputs({"input": X.numpy()}), mptk.InputError, "example_inputs"),
    Call("example inputs of no dimension", inputs(torch.tensor(1.0)), mptk.DataError, "example inputs"),
    Call("example inputs of no sample", inputs(X[:0]), mptk.DataError, "example inputs"),
    Call("example inputs of another width", inputs(X[..., :5]), mptk.TraceError, "Sequential"),
    Call("example inputs of another type", inputs(X.long()), mptk.DataError, "example_inputs"),
    Call("example inputs that are too many", inputs((X, X)), mptk.InputError, "example_inputs"),
    Call("example inputs of an unknown name", inputs({"y": X}), mptk.TraceError, "Sequential"),
    Call(
        "example inputs of ragged numbers",
        lambda p: prune(p, p.two, example_inputs=(X, IDS)),
        mptk.DataError,
        "example inputs",
    ),
    Call("example inputs that are too few", lambda p: prune(p, p.two, example_inputs=X), mptk.TraceError, "Two"),
    Call("example inputs of NaN", inputs(with_value(float("nan"))), mptk.DataError, "input"),
    Call("example inputs on the meta device", inputs(X.to("meta")), mptk.DataError, "input"),
    Call("example inputs that are sparse", inputs(X.to_sparse()), mptk.DataError, "input"),
    Call("example inputs that are quantized", lambda p: prune(p, example_inputs=quantized()), mptk.DataError, "input"),
    Call(
        "example inputs without names", lambda p: prune(p, Unnamed(), example_inputs=(X, X)), mptk.ModelError, "forward"
    ),
    Call("example inputs twice", settings(inputs="x.safetensors"), mptk.InputError, "example_inputs"),
    Call(
        "an inputs file that is not there",
        settings(example_inputs=None, inputs="no.safetensors"),
        mptk.FileError,
        "no.safetensors",
    ),
]
DATA = [
    Call("data that is a number", data(lambda: 7), mptk.InputError, "data"),
    Call("data that is empty", data(list), mptk.DataError, "data"),
    Call("data that is a closed generator", data(closed), mptk.DataError, "data"),
    Call("data that is an empty generator", data(lambda: iter(())), mptk.DataError, "data"),
    Call("data of no samples", data(lambda: X[:0]), mptk.DataError, "input"),
    Call("data of another rank", data(lambda: X[0, 0]), mptk.DataError, "input"),
    Call("data of another width", data(lambda: X[..., :5]), mptk.DataError, "data"),
    Call("data of whole numbers", data(X.long), mptk.DataError, "input"),
    Call("data of ragged batches", data(lambda: [X, X[:, :3]]), mptk.DataError, "data"),
    Call("data of another name", data(lambda: {"y": X}), mptk.DataError, "input"),
    Call("data of strings in a dict", data(lambda: {"input": ["a"]}), mptk.DataError, "input"),
    Call("data of NaN", data(lambda: with_value(float("nan"))), mptk.DataError, "input"),
    Call("data of infinity", data(lambda: with_value(float("inf"))), mptk.DataError, "input"),
    Call("data on the meta device", data(lambda: X.to("meta")), mptk.DataError, "input"),
    Call("data that is sparse", data(X.to_sparse), mptk.DataError, "input"),
    Call("data that is quantized", data(quantized), mptk.DataError, "input"),
    Call("data of None", data(lambda: [None, None]), mptk.DataError, "data"),
    Call("data of numbers", data(lambda: [1.0, 2.0]), mptk.DataError, "data"),
    Call("data of a batch of nothing", data(lambda: [()]), mptk.DataError, "input"),
    Call(
        "data in a loader of labels", data(lambda: DataLoader(TensorDataset(torch.arange(4)))), mptk.DataError, "input"
    ),
    Call("data of Samples of another name", data(lambda: mptk.Samples({"y": X})), mptk.DataError, "input"),
    Call("data of Samples of nothing", data(lambda: mptk.Samples({})), mptk.DataError, "input"),
    Call("data of Samples of lists", data(lambda: mptk.Samples({"input": [[1.0]]})), mptk.DataError, "input"),
    Call("data of text for a module", data(lambda: ["some text"]), mptk.InputError, "tokenizer"),
    Call("text of a file that is not there", texts(lambda: Path("no.txt")), mptk.FileError, "no.txt"),
    Call("text that is empty", texts(lambda: ["", ""]), mptk.DataError, "data"),
    Call("text that is bytes", texts(lambda: [b"some text"]), mptk.DataError, "data"),
    Call(
        "text without a tokenizer",
        lambda p: lm(p, tokenizer=None, data=["a text"]),
        mptk.InputError,
        "tokenizer",
    ),
    Call("text beside a number", texts(lambda: ["some text", 7]), mptk.DataError, "data"),
    Call("text that is too short", texts(lambda: ["a b"]), mptk.DataError, "data"),
    Call("ids beyond the vocabulary", texts(lambda: IDS + 300), mptk.DataError, "input_ids"),
    Call("ids below zero", texts(lambda: IDS - 9), mptk.DataError, "input_ids"),
    Call("ids that are floats", texts(IDS.float), mptk.DataError, "input_ids"),
    Call("ids of no tokens", texts(lambda: IDS[:, :0]), mptk.DataError, "input_ids"),
    Call("ids of three dimensions", texts(lambda: IDS[None]), mptk.DataError, "input_ids"),
    Call("ids longer than the positions", texts(lambda: IDS.repeat(1, 4)), mptk.InputError, "96 tokens of data"),
]
SETTINGS = [
    Call("an unknown keyword", settings(sparcity=0.5), mptk.KeywordError, "sparcity"),
    Call("a keyword like no other", settings(qqq=1), mptk.KeywordError, "qqq"),
    Call("a negative sparsity", settings(sparsity=-0.1), mptk.InputError, "sparsity"),
    Call("a sparsity of one", settings(sparsity=1), mptk.InputError, "sparsity"),
    Call("a huge sparsity", settings(sparsity=10**400), mptk.InputError, "sparsity"),
    Call("a sparsity of NaN", settings(sparsity=float("nan")), mptk.InputError, "sparsity"),
    Call("a sparsity of infinity", settings(sparsity=float("inf")), mptk.InputError, "sparsity"),
    Call("a sparsity in words", settings(sparsity="half"), mptk.InputError, "sparsity"),
    Call("a sparsity that is a bool", settings(sparsity=True), mptk.InputError, "sparsity"),
    Call("a sparsity that is a tensor", settings(sparsity=torch.tensor(0.5)), mptk.InputError, "sparsity"),
    Call("a sparsity of None", settings(sparsity=None), mptk.InputError, "sparsity"),
    Call("samples that are a float", settings(samples=2.5), mptk.InputError, "samples"),
    Call("samples that are a bool", settings(samples=True), mptk.InputError, "samples"),
    Call("no samples", settings(samples=0), mptk.InputError, "samples"),
    Call("a seed below zero", settings(seed=-1), mptk.InputError, "seed"),
    Call("a seed that is a string", settings(seed="0"), mptk.InputError, "seed"),
    Call("an unknown method", settings(method="wonda"), mptk.InputError, "wonda"),
    Call("a method that is a number", settings(method=7), mptk.InputError, "method"),
    Call("a method of None", settings(method=None), mptk.InputError, "method"),
    Call("an unknown target", settings(target="onix"), mptk.InputError, "onix"),
    Call("an unknown budget", settings(budget="size"), mptk.InputError, "budget"),
    Call("a family that is not there", settings(families="ffn"), mptk.InputError, "ffn"),
    Call("families twice", settings(families=("channels", "channels")), mptk.InputError, "families"),
    Call("families that are a number", settings(families=7), mptk.InputError, "families"),
    Call("families of numbers", settings(families=(1, 2)), mptk.InputError, "families"),
    Call("families that are bytes", settings(families=b"channels"), mptk.InputError, "families"),
    Call("a family kept and cut", settings(families="channels", keep="channels"), mptk.InputError, "keep"),
    Call("widths that are a list", settings(widths=[6]), mptk.InputError, "widths"),
    Call("widths that are strings", settings(widths={"channels": "6"}), mptk.InputError, "widths"),
    Call("a width of zero", settings(widths={"channels": 0}), mptk.BudgetError, "channels"),
    Call("a width that is too large", settings(widths={"channels": 99}), mptk.BudgetError, "channels"),
    Call("a flag that is a string", settings(portable="no"), mptk.InputError, "portable"),
    Call("a flag that is a number", settings(onnx=3), mptk.InputError, "onnx"),
    Call("masks for a module", settings(method="maskprune"), mptk.InputError, "method"),
    Call("steps for a module", settings(steps=3), mptk.InputError, "steps"),
    Call("a learning rate that is a string", settings(lr="1e-4"), mptk.InputError, "lr"),
    Call("settings that are a dict", settings(settings={"sparsity": 0.5}), mptk.InputError, "settings"),
    Call("a learning that is a dict", settings(learning={"steps": 1}), mptk.InputError, "learning"),
    Call("a device that is not there", settings(device="tpu"), mptk.InputError, "device"),
    Call("a device that is a number", settings(device=0), mptk.InputError, "device"),
    Call("memory that is a string", settings(memory="8GB"), mptk.InputError, "memory"),
    Call("a plan that is not there", settings(plan="no.json"), mptk.PlanError, "no.json"),
    Call("a plan that is a number", settings(plan=3), mptk.InputError, "plan"),
    Call("progress that is a string", settings(progress="bars"), mptk.InputError, "progress"),
    Call("on_stage that is no function", settings(on_stage=3), mptk.InputError, "on_stage"),
    Call("an output that is a number", settings(out=7), mptk.InputError, "out"),
    Call("an output that is bytes", settings(out=b"o"), mptk.InputError, "out"),
    Call("an output that is empty", settings(out=""), mptk.OutputError, "."),
    Call("a tokenizer that is a string", lambda p: lm(p, tokenizer="t"), mptk.InputError, "tokenizer"),
    Call("a vocabulary that is a number", lambda p: lm(p, vocabulary=7), mptk.InputError, "vocabulary"),
    Call("a second positional settings", lambda p: mptk.prune(p.module, None, None, 0.5), TypeError),
    Call("no model at all", lambda p: mptk.prune(), TypeError),
]


def _rewrite(**plan: Any) -> Callable[[Parts], Any]:
    return lambda p: mptk.rewrite(p.analysis, p.plan(**plan))


COMPILER = [
    Call("analyze a number", lambda p: mptk.analyze(7), mptk.InputError, "model"),
    Call("analyze nothing known", lambda p: mptk.analyze(p.module), mptk.InputError, "example_inputs"),
    Call("analyze with a number", lambda p: mptk.analyze(p.module, 7), mptk.InputError, "example_inputs"),
    Call("analyze with a list of numbers", lambda p: mptk.analyze(p.module, [1, 2]), mptk.InputError, "example_inputs"),
    Call(
        "analyze with a bare tensor of another rank",
        lambda p: mptk.analyze(p.module, X[0, 0, :3]),
        mptk.TraceError,
        "Sequential",
    ),
    Call(
        "trace with a word for a flag", lambda p: mptk.trace(p.module, (X,), dynamic="yes"), mptk.InputError, "dynamic"
    ),
    Call(
        "show after nothing known",
        lambda p: mptk.show(p.module, (X,), after="cut", plan=p.plan()),
        mptk.InputError,
        "cut",
    ),
    Call(
        "show after a pass without a plan",
        lambda p: mptk.show(p.module, (X,), after="rewrite"),
        mptk.InputError,
        "plan",
    ),
    Call("show of a number", lambda p: mptk.show(7), mptk.InputError, "model"),
    Call("rewrite a module", lambda p: mptk.rewrite(p.module, p.plan()), mptk.InputError, "analysis"),
    Call("rewrite with a path", lambda p: mptk.rewrite(p.analysis, "plan.json"), mptk.InputError, "plan"),
    Call("rewrite with None", lambda p: mptk.rewrite(p.analysis, None), mptk.InputError, "plan"),
    Call("rewrite with a dict", lambda p: mptk.rewrite(p.analysis, {"channels": 6}), mptk.InputError, "plan"),
    Call("rewrite a plan of another model", _rewrite(name="ffn"), mptk.PlanError, "ffn"),
    Call("rewrite a plan of another width", _rewrite(of=20), mptk.PlanError, "channels"),
    Call("rewrite a plan of no units", _rewrite(width=0), mptk.PlanError, "channels"),
    Call("rewrite a plan of a unit twice", _rewrite(width=2, keep=((3, 3),)), mptk.PlanError, "plan: channels."),
    Call(
        "rewrite a plan of units in another order", _rewrite(width=2, keep=((3, 1),)), mptk.PlanError, "plan: channels."
    ),
    Call("rewrite a plan of units beyond", _rewrite(width=2, keep=((3, 30),)), mptk.PlanError, "plan: channels."),
    Call("rewrite a plan of units below", _rewrite(width=2, keep=((-1, 3),)), mptk.PlanError, "plan: channels."),
    Call("rewrite a plan of words", _rewrite(width=2, keep=(("a", "b"),)), mptk.PlanError, "plan: channels."),
    Call("rewrite a plan of fractions", _rewrite(width=2, keep=((0.5, 3),)), mptk.PlanError, "plan: channels."),
    Call(
        "rewrite a plan without layers", lambda p: mptk.rewrite(p.analysis, _of_layers({})), mptk.PlanError, "channels"
    ),
    Call("rewrite a plan of rows in a list", _rewrite(keep=3), mptk.PlanError, "channels"),
    Call(
        "a plan's file that is not there",
        lambda p: mptk.Plan.load(p.root / "no.json"),
        mptk.PlanError,
        "{root}/no.json",
    ),
    Call("a plan that is a folder", lambda p: mptk.Plan.load(p.root), mptk.PlanError, "{root}"),
]


def _of_layers(keep: Any) -> mptk.Plan:
    return mptk.Plan({"channels": mptk.FamilyPlan(6, 12, keep)})


USE = [
    Call("open a number", lambda p: mptk.Pruned.open(7), mptk.InputError, "folder"),
    Call("open nowhere", lambda p: mptk.Pruned.open(p.root / "no"), mptk.FileError, "{root}/no"),
    Call("open a model", lambda p: mptk.Pruned.open(p.folders["model"]), mptk.FileError, "{tiny}/model"),
    Call("save to a number", lambda p: p.pruned.save(7), mptk.InputError, "folder"),
    Call("save onto a folder of others", lambda p: p.pruned.save(p.folders["model"]), mptk.OutputError, "{tiny}/model"),
    Call(
        "save below a file", lambda p: p.pruned.save(p.folders["text.raw"] / "o"), mptk.OutputError, "{tiny}/text.raw/o"
    ),
    Call("recover a number", lambda p: mptk.recover(7), mptk.InputError, "pruned"),
    Call("recover nowhere", lambda p: mptk.recover(p.root / "no"), mptk.FileError, "{root}/no"),
    Call(
        "recover to another sparsity",
        lambda p: mptk.recover(p.pruned, sparsity=0.2),
        mptk.InputError,
        "sparsity",
    ),
    Call("recover with an unknown keyword", lambda p: mptk.recover(p.pruned, stepps=2), mptk.KeywordError, "stepps"),
    Call("recover in words", lambda p: mptk.recover(p.pruned, steps="two"), mptk.InputError, "steps"),
    Call("recover a module", lambda p: mptk.recover(p.module), mptk.InputError, "pruned"),
    Call("verify a number", lambda p: mptk.verify(7), mptk.InputError, "folder"),
    Call("verify a model", lambda p: mptk.verify(p.folders["model"]), mptk.FileError, "{tiny}/model"),
    Call("verify against a number", lambda p: mptk.verify(p.folders["pruned"], model=7), mptk.InputError, "model"),
    Call(
        "verify in no tokens",
        lambda p: mptk.verify(p.folders["pruned"], proof_length=3),
        mptk.InputError,
        "proof_length",
    ),
    Call(
        "verify against another model",
        lambda p: mptk.verify(p.folders["pruned"], model=p.module),
        mptk.InputError,
        "model",
    ),
    Call("evaluate a number", lambda p: mptk.evaluate(7, IDS), mptk.InputError, "model"),
    Call("evaluate on nothing", lambda p: mptk.evaluate(p.model), mptk.InputError, "data"),
    Call("evaluate on a number", lambda p: mptk.evaluate(p.model, 7), mptk.InputError, "data"),
    Call("evaluate on no windows", lambda p: mptk.evaluate(p.model, IDS, windows=0), mptk.InputError, "eval_windows"),
    Call(
        "evaluate on words for windows", lambda p: mptk.evaluate(p.model, IDS, windows="2"), mptk.InputError, "windows"
    ),
    Call("evaluate without a tokenizer", lambda p: mptk.evaluate(p.model, ["a text"]), mptk.InputError, "tokenizer"),
    Call(
        "evaluate ids beyond", lambda p: mptk.evaluate(p.model, IDS + 300, progress=None), mptk.DataError, "input_ids"
    ),
    Call(
        "evaluate a module alone",
        lambda p: mptk.evaluate(p.module, X, example_inputs=X),
        mptk.InputError,
        "dense",
    ),
    Call("generate from a number", lambda p: mptk.generate(7, "a"), mptk.InputError, "model"),
    Call(
        "generate after a number",
        lambda p: mptk.generate(p.model, 7, tokenizer=p.tokenizer),
        mptk.InputError,
        "prompts",
    ),
    Call(
        "generate after numbers",
        lambda p: mptk.generate(p.model, [7], tokenizer=p.tokenizer),
        mptk.InputError,
        "prompts",
    ),
    Call("generate without a tokenizer", lambda p: mptk.generate(p.model, "a"), mptk.InputError, "tokenizer"),
    Call(
        "generate in a cold",
        lambda p: mptk.generate(p.model, "a", tokenizer=p.tokenizer, temperature=-1.0),
        mptk.InputError,
        "temperature",
    ),
    Call(
        "generate no tokens",
        lambda p: mptk.generate(p.model, "a", tokenizer=p.tokenizer, max_new_tokens=0),
        mptk.InputError,
        "max_new_tokens",
    ),
    Call(
        "generate words for tokens",
        lambda p: mptk.generate(p.model, "a", tokenizer=p.tokenizer, max_new_tokens="9"),
        mptk.InputError,
        "max_new_tokens",
    ),
    Call(
        "generate by a module",
        lambda p: mptk.generate(p.module, "a", tokenizer=p.tokenizer),
        mptk.ModelError,
        "Sequential",
    ),
    Call("export a number", lambda p: mptk.export(7, p.root / "e"), mptk.InputError, "model"),
    Call("export to a number", lambda p: mptk.export(p.model, 7), mptk.InputError, "folder"),
    Call("export a module", lambda p: mptk.export(p.module, p.root / "e"), mptk.InputError, "example_inputs"),
    Call(
        "export in an unknown scheme",
        lambda p: mptk.export(p.model, p.root / "e", quantize=("int3",)),
        mptk.InputError,
        "quantize",
    ),
    Call(
        "export in an unknown type",
        lambda p: mptk.export(p.model, p.root / "e", onnx_dtype="f8"),
        mptk.InputError,
        "onnx_dtype",
    ),
    Call("export some logits", lambda p: mptk.export(p.model, p.root / "e", logits="some"), mptk.InputError, "logits"),
    Call(
        "export by a path for a plan",
        lambda p: mptk.export(p.model, p.root / "e", plan="p.json"),
        mptk.InputError,
        "plan",
    ),
    Call("bench nothing", lambda p: mptk.bench([]), mptk.InputError, "models"),
    Call("bench a number", lambda p: mptk.bench([7]), mptk.InputError, "models"),
    Call("bench one name", lambda p: mptk.bench("model"), mptk.InputError, "models"),
    Call(
        "bench lengths in words", lambda p: mptk.bench([p.folders["gpt2"]], lengths=("a",)), mptk.InputError, "lengths"
    ),
    Call("load a number", lambda p: mptk.load(7), mptk.InputError, "model"),
    Call("load a path to nowhere", lambda p: mptk.load(str(p.root / "no")), mptk.FileError, "{root}/no"),
    Call("load as no float", lambda p: mptk.load(str(p.folders["model"]), dtype="float32"), mptk.InputError, "dtype"),
    Call("fetch a number", lambda p: mptk.fetch(7), mptk.InputError, "alias"),
    Call("fetch an unknown alias", lambda p: mptk.fetch("smollm9"), mptk.InputError, "smollm9"),
    Call("shapes of a number", lambda p: mptk.shapes(7), mptk.InputError, "model"),
    Call(
        "shapes of a word for a number",
        lambda p: mptk.shapes(p.module, example_inputs=X, sparsity="x"),
        mptk.InputError,
        "sparsity",
    ),
    Call("a rule of no op", lambda p: mptk.rule(7)(print), mptk.InputError, "ops"),
    Call("a rule of an unknown zero", lambda p: mptk.rule("my::op", zero="some")(print), mptk.InputError, "zero"),
]
LONG, NULL = "a" * 300, "a\0b"
IN_USE = [
    Call("a copy of a result", lambda p: copy.copy(p.pruned), mptk.InputError),
    Call("a deep copy of a result", lambda p: copy.deepcopy(p.pruned), mptk.InputError),
    Call("a pickle of a result", lambda p: pickle.dumps(p.pruned), mptk.InputError),
    Call("a long out", lambda p: prune(p, out=LONG), mptk.OutputError, f"{{root}}/{LONG}"),
    Call("a long folder to save", lambda p: p.pruned.save(LONG), mptk.OutputError, f"{{root}}/{LONG}"),
    Call("a long folder to open", lambda p: mptk.Pruned.open(LONG), mptk.InputError, LONG),
    Call("a long model", lambda p: mptk.prune(LONG, progress=None), mptk.InputError, LONG),
    Call("a long folder to verify", lambda p: mptk.verify(LONG), mptk.InputError, LONG),
    Call(
        "a long folder to measure",
        lambda p: mptk.evaluate(LONG, X, progress=None),
        mptk.InputError,
        f"{LONG}/report.json",
    ),
    Call("a long folder to generate", lambda p: mptk.generate(LONG, "a"), mptk.InputError, LONG),
    Call("a long report", lambda p: mptk.Report.read(LONG), mptk.InputError, LONG),
    Call("a null character in out", lambda p: prune(p, out=NULL), mptk.OutputError, "a\u0000b"),
    Call("a null character in save", lambda p: p.pruned.save(NULL), mptk.OutputError, "a\u0000b"),
    Call("a current folder that was removed", lambda p: _without_current_folder(p), mptk.OutputError, "relative"),
    Call("no folder for temporary files", lambda p: _without_temporary_folder(p), mptk.MachineError, "{root}/gone"),
    Call(
        "a misspelt keyword of export",
        lambda p: mptk.export(p.module, "graph", example_inputs=X, quantise=["int8"]),
        mptk.InputError,
        "quantise",
    ),
    Call(
        "a tokenizer for a module",
        lambda p: mptk.export(p.module, "graph", example_inputs=X, tokenizer=p.tokenizer),
        mptk.InputError,
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
