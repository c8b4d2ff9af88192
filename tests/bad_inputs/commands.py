"""Rows that go through a whole command: each command once, and each class of error that a command line can meet."""

from __future__ import annotations

from mptk.errors import (
    AnalysisError,
    BudgetError,
    ChangedError,
    DataError,
    FileError,
    InputError,
    MachineError,
    ModelError,
    OutputError,
    PlanError,
)
from tests.bad_inputs.models import DAMAGED, WEIGHTS, fields
from tests.bad_inputs.options import ONCE
from tests.bad_inputs.plans import plan
from tests.bad_inputs.table import USAGE, Row, remove, write

ROWS = [
    Row("prune, too much", f"{ONCE} --align 8 --sparsity 97%", BudgetError),
    Row(
        "prune, no KV heads", "prune {gpt2-dense} --data {text.raw} --out {out} --kv-heads 1 --length 8", AnalysisError
    ),
    Row("prune, device", f"{ONCE} --device xpu:7", MachineError),
    Row("prune, output", "prune {model} --data {text.raw} --out {model}", OutputError),
    Row(
        "prune, escape",
        "prune --config {run.yaml} --out {out}",
        USAGE,
        "",
        (write("run.yaml", 'method: "\\e]8;;x\\a"'),),
    ),
    Row("prune, weights", ONCE, FileError, "", (write(WEIGHTS, DAMAGED["truncated"]),)),
    Row(
        "recover", "recover {pruned} --data {text.raw} --out {out}", FileError, "", (write("pruned/report.json", "[]"),)
    ),
    Row("report", "report {pruned}", FileError, "", (write("pruned/report.json", '{"a": "\x1b]8;;x"'),)),
    Row("verify", "verify {pruned}", ChangedError, "", (write("pruned/README.md", "x"),)),
    Row("analyze", "analyze {model}", ModelError, "", (fields("model/config.json", model_type="[/x]\x1b"),)),
    Row("show", "show {model} --after rewrite --plan {p.json}", PlanError, "", (write("p.json", plan(of=65)),)),
    Row("eval", "eval {model} --data {text.raw}", FileError, "", (write("model/config.json", "{"),)),
    Row("generate", "generate {gpt2} hello", FileError, "", (write("gpt2/onnx/model.onnx", b""),)),
    Row("bench", "bench {gpt2} --lengths 16", InputError),
    Row("export", "export {model} --out {out}", FileError, "", (remove(WEIGHTS),)),
    Row("shapes", "shapes {model} --data {text.raw} --tokens 9", DataError),
    Row("advise", "advise {model} --data {text.raw} --tolerance x", InputError),
    Row("gguf", "gguf {pruned} --like {toy.gguf} --out {out.gguf}", FileError, "", (write("toy.gguf", b"GGUF"),)),
    Row("push", "push {nowhere} me/name", FileError),
    Row("rerun", "rerun {pruned} --out {out}", FileError, "", (remove("pruned/run.yaml"),)),
    Row("rung", "rung {pruned} 0.3 --out {out}", FileError),
    Row("fetch", "fetch smollm9", InputError),
    Row("models", "models --nonsense", USAGE),
    Row("features", "features --json /", USAGE),
    Row("ops", "ops --json /", USAGE),
    Row("passes", "passes all", USAGE),
]
