"""cases: panels of the help, sets of commands, and the cases in which a setting does nothing."""

from __future__ import annotations

from mptk.config.setting import Idle
from mptk.cost.budgets import CACHED, LATENCY
from mptk.ir import needs_graphs

CUT, CHOICE, DATA, TRAIN, WRITE, MACHINE = "What to cut", "How to choose", "Data", "Training", "Output", "Machine"
CHOOSER, READER, DIVIDER, WRITER = "chooses units", "reads data", "divides a budget", "writes a run"
"""Roles of the commands of features: they have the options of all settings on commands that do the same."""
PRUNE, TRAINING = ("prune",), ("prune", "recover")
SEARCH, CHOOSING = ("prune", DIVIDER), ("prune", CHOOSER)
RUNS, READING = ("prune", "recover", WRITER), ("prune", "recover", READER)
"""Commands: ``CHOOSING`` choose units, ``READING`` read data, ``RUNS`` write a result."""
ON_DEVICE = (*READING, "verify", "export", "generate", "eval", "bench")

# ---- cases in which a setting does nothing ----
# A typed option that does nothing is an error, so each case has a reason and a remedy. Lambdas get an ``Asked``. Of the
# cases of a setting the first that holds is named.

PLANNED = Idle(lambda a: a.settings.plan is not None, "--plan already says which units stay", "leave out one of both")
ALL_STAY = Idle(
    lambda a: a.settings.plan is None and a.settings.fixed,
    "--sparsity 0 removes only tokens or KV heads",
    "give a --sparsity, or leave it out",
)
CHOOSES = (PLANNED, ALL_STAY)
"""Cases of the settings that say how units are chosen."""
TIMED = Idle(lambda a: a.settings.max_ms is not None, "a latency is the budget", "leave out one of both")
UNTIMED = Idle(
    lambda a: a.settings.budget != LATENCY, "it needs a latency to predict", "give --max-decode-ms, or leave it out"
)
DECODING = (LATENCY, "decode")
"""The budget and the phase that predict decoding."""
UNCACHED = Idle(
    lambda a: not (a.decodes or a.settings.budget in CACHED or (a.settings.budget, a.settings.objective) == DECODING),
    "only the budgets kv-cache and serving and predicted decoding count a KV cache",
    "give --budget serving or --max-decode-ms, or leave it out",
)
PHASED = (
    Idle(lambda a: a.settings.max_ms is not None, "--max-decode-ms and --max-prefill-ms name the phase"),
    Idle(
        lambda a: a.settings.budget != LATENCY and not a.settings.onnx,
        "this run predicts no latency and writes no graph",
    ),
)
NO_MASKS = Idle(lambda a: not a.learns, "this method learns no masks", "give --method maskprune, or leave it out")
WHOLE_BLOCKS = Idle(
    lambda a: not a.settings.distil_epochs, "it needs --distil-epochs", "give --distil-epochs 3, or leave it out"
)
UNTRAINED = (
    Idle(
        lambda a: not a.settings.trains,
        "nothing is trained",
        lambda a: f"give {a.settings.training_option}, or leave it out",
    ),
)
ADAPTED = Idle(lambda a: bool(a.settings.learning.rank), "AdamW trains adapters", "leave out one of both")
DECIDED = Idle(lambda a: not a.undecided, "the numbers that it would choose are given", "leave out one of both")
NO_GRAPH = Idle(lambda a: not a.settings.onnx, "--no-onnx writes no graph", "leave out one of both")
ENGINED = Idle(lambda a: a.settings.engines, "--engines names the programs", "leave out one of both")
UNREAD = Idle(
    lambda a: a.writes and not a.settings.onnx and needs_graphs(a.settings.engines),
    "--no-onnx writes no graph, and it names a program that reads nothing else",
    "leave out one of both",
)
NO_CLASS = Idle(lambda a: a.settings.target != "stock", "only the target stock needs a class")
UNKEPT = (
    Idle(lambda a: a.estimate, "--estimate runs nothing", "leave out one of both"),
    Idle(lambda a: a.settings.fixed and not a.settings.steps, "this run writes no checkpoints"),
    Idle(lambda a: not a.writes, "without --out nothing is kept", "give --out, or leave it out"),
)
