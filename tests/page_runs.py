"""For the tests of pages: runs made of values, as no model is pruned, and what a page says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html.parser import HTMLParser
from typing import Any

from mptk import FamilyPlan, Plan, Report, Settings, reading
from mptk.ort.bench import Bench
from mptk.report.runs import Run

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$x^2$"
WORDS: Mapping[str, str] = {
    "run": "m30",
    "model": "acme/small",
    "method": "maskprune",
    "family": "ffn",
    "refusal": "the class derives it",
    "layer": "model.layers.0.mlp",
    "metric": "perplexity",
    "protocol": "wikitext: 4 windows of 32 tokens",
    "split": "ffn=24",
    "stage": "reloaded checkpoint",
    "widened": "rounding moves it as much",
    "scheme": "int8",
    "graph": "dense",
    "note": "a note",
    "source": "text.txt",
    "version": "torch",
    "phase": "masks",
    "pass": "rewrite",
}
"""Every text of a run that comes from outside, by what it names."""


def made(*, quality: float = 40.0, dense: float = 20.0, sha: str = "d", removed: float = 0.3, **words: str) -> Run:
    """A run with everything that a page can show. ``words`` replaces some of ``WORDS``."""
    w = {**WORDS, **words}
    keep = {f"{w['layer']}{i}": (tuple(range(i, 24 + i)),) for i in range(3)}
    heads = {f"{w['layer']}{i}": ((0, 1), (1, 2)) for i in range(3)}
    report = Report(
        mptk="0.1.0",
        model=w["model"],
        model_sha256=sha,
        settings=Settings(method=w["method"], data=w["source"]),
        families={
            w["family"]: {"of": 40, "width": 24, "layers": 3},
            "q_heads": {"of": 3, "width": 2, "layers": 3},
            "v_dim": {"of": 8, "width": 8, "layers": 3},
            "hidden": {"of": 36, "width": 36, "layers": 1},
        },
        legal={
            w["family"]: {"widths": [8, 16, 24, 32, 40], "refused": None},
            "q_heads": {"widths": [2, 3], "refused": None},
            "v_dim": {"widths": [8], "refused": w["refusal"]},
            "hidden": {"widths": [18, 36], "refused": None},
        },
        sparsity=removed,
        cost={
            "dense": {"parameters": 10000, "block": 8000, "flops": 19000, "bytes": 40000},
            "pruned": {"parameters": 7600, "block": 5600, "flops": 14000, "bytes": 30400},
        },
        splits={w["split"]: 4.25, "ffn=32": 4.5},
        trained=[],
        weights_sha256="",
        quality={"metric": w["metric"], "dense": dense, "pruned": quality, "protocol": w["protocol"]},
        quantized={w["scheme"]: {"file": "onnx/model_quantized.onnx", "bytes": 9000, "quality": quality + 1}},
        proof=[
            {"stage": "config", "max_abs": 0.0, "relative": 0.0, "tolerance": 0.0, "ok": True},
            {
                "stage": w["stage"],
                "max_abs": 1e-6,
                "relative": 2.5e-6,
                "tolerance": 5e-5,
                "ok": True,
                "widened": w["widened"],
            },
        ],
        proof_length=48,
        config_changes={},
        plan_sha256="",
        notes=[w["note"]],
        stages=[{"name": "load", "seconds": 1.0}, {"name": w["pass"], "seconds": 0.25}],
        files=[],
        data={
            "evaluation": {"source": w["source"], "samples": 4, "inputs": {"input_ids": {"sha256": "e"}}},
            "files": {},
        },
        versions={w["version"]: "2.13.0"},
    )
    plan = Plan({w["family"]: FamilyPlan(24, 40, keep), "q_heads": FamilyPlan(2, 3, heads)})
    steps = [metrics(step, w["family"]) for step in (1, 2, 3)]
    return Run(w["run"], report, plan, timed(w["graph"]), {w["phase"]: steps})


def metrics(step: int, family: str) -> dict[str, Any]:
    """A line of ``metrics.jsonl`` of a run that learns masks."""
    losses = {"loss": 3.0 - step / 10, "lm": 3.0 - step / 10, "kl": 0.0}
    return {
        "step": step,
        **losses,
        "cost": 0.8,
        "target": 0.7,
        "z": 0.1 * step,
        f"width/{family}": 24.0,
    }


def timed(graph: str) -> Bench:
    """A comparison of two graphs in two cases."""
    rows = []
    for phase in ("prefill", "decode"):
        case = {"phase": phase, "length": 128, "batch": 1, "threads": 1}
        for name, ratio in ((graph, 1.0), ("pruned", 0.75)):
            rows.append(
                {"graph": name, "case": case, "ms": 12.5 * ratio, "iqr_ms": 0.5, "tokens_s": 80.0, "ratio": ratio}
                | {"ideal": 0.7 if ratio < 1 else 1.0, "work": 100, "roofline": 0.6}
            )
    graphs = [{"name": name, "file": "", "bytes": 1, "memory": 1} for name in (graph, "pruned")]
    peaks = {"1": {"flops": 1e9, "bandwidth": 1e9}}
    return reading.make_typed(
        Bench, {"graphs": graphs, "onnxruntime": "1.32", "rounds": 3, "peaks": peaks, "rows": rows}
    )


class Parsed(HTMLParser):
    """Tags, attributes and texts of a page, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
