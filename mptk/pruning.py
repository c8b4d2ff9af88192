"""prune: the main job, from a model's name to a proven folder.

trace → analyse → legalise → score → choose widths → cut → emit → prove → publish. Nothing is published unless every
stage of the proof is within its tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import mptk
import passes.trace
from mptk import criteria, data, models, pipeline
from mptk.api import Progress, cut_program, export, plan_digest, plan_of
from mptk.checkpoint import portable, save_tokenizer
from mptk.cost import CostModel
from mptk.cut import resolve_plan
from mptk.errors import MptkError
from mptk.evaluation import perplexity
from mptk.families import Analysis
from mptk.plan import Plan
from mptk.program import Program
from mptk.runtime import OrtDecoder
from passes import group, legalize
from passes.emit_hf import check_replaceable, publish, write_checkpoint
from passes.mask import mask
from passes.rehome import find_home, logits_check, rehome
from passes.stock_config import StockConfig
from passes.verify import RUNTIME_TOLERANCE, TOLERANCE, Difference, Logits, prove

REPORT = "mptk-report/1"
PROOF_SHAPE = (2, 48)
DECODED = 4
SPLITS = 6
"""How many ways to divide the budget among families are tried on calibration text."""


@dataclass(frozen=True)
class Settings:
    """What ``prune`` is asked for. ``widths`` fixes families' widths, ``plan`` fixes everything.

    ``rehome``: where the model's own config class refuses the cut, another class may hold it (``passes/rehome.py``).
    """

    sparsity: float = 0.3
    method: str = "wanda"
    data: str = "self"
    samples: int = 32
    length: int = 256
    eval_data: str | None = None
    eval_windows: int = 40
    eval_length: int = 512
    families: tuple[str, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)
    plan: str | None = None
    target: str = "stock"
    multiple: int = legalize.MULTIPLE
    tolerance: float = 0.01
    onnx: bool = True
    seed: int = 0
    trust_remote_code: bool = False
    rehome: bool = False


def prune(
    model: str, out: str | Path, settings: Settings | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Prune ``model`` and write the result to the folder ``out``; returns its report (also ``out/report.json``).

    Raises:
        MptkError: the model cannot be loaded, traced or cut; no legal widths meet the budget (said before any work);
            or a stage of the proof is above its tolerance. Then nothing is written.
    """
    return Run(model, Path(out), settings or Settings(), progress or (lambda stage, done, total: None)).run()


class Run:
    """One run of ``prune``: the steps in order, each a method."""

    def __init__(self, model: str, out: Path, settings: Settings, progress: Progress) -> None:
        self.source, self.out, self.settings, self.progress = model, out, settings, progress
        self.log = pipeline.Log()
        self.notes: list[str] = []
        self.losses: dict[str, float] = {}
        self.compensation: Mapping[str, Tensor] = {}

    def run(self) -> dict[str, Any]:
        self._prepare()
        self._plan()
        with publish(self.out) as folder:
            self._emit(folder)
            self._prove(folder)
            report = self._report(folder)
            (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        return report

    # ---- before anything is cut ----

    def _prepare(self) -> None:
        """Load, trace, analyse and find legal widths."""
        s = self.settings
        criteria.find_criterion(s.method)
        check_replaceable(self.out)
        with self._stage("load"):
            self.loaded = models.load(self.source, trust_remote_code=s.trust_remote_code)
        self.model = self.loaded.model
        with self._stage("trace"):
            self.program = passes.trace.trace(self.model, dynamic=True)
        with self._stage("analyse"):
            self.analysis = group.analyze(self.program)
            self.cost = CostModel(self.analysis)
        with self._stage("legalise"):
            self.candidates = [] if s.plan else self._legalise()

    def _legalise(self) -> list[legalize.Candidate]:
        """Candidates that the model's own class holds or, if it holds none and ``rehome`` is set, another class."""
        s = self.settings
        try:
            return self._candidates(find_target(self.analysis, self.model, s.target, s.multiple))
        except MptkError as error:
            candidates, home = self._elsewhere()
            if home is None:
                raise
            if not s.rehome:
                raise MptkError(f"{error}; or give --rehome: {home} holds them with equal logits") from error
            return candidates

    def _elsewhere(self) -> tuple[list[legalize.Candidate], str | None]:
        """Candidates that only another class than the model's own would hold, and that class's name."""
        s = self.settings
        if s.target != "stock":
            return [], None
        try:
            candidates = self._candidates(legalize.stock_target(self.analysis, self.model, s.multiple, rehome=True))
        except MptkError:
            return [], None
        return candidates, find_home(self.analysis, self.model, candidates[0].widths)

    def _candidates(self, target: legalize.Target) -> list[legalize.Candidate]:
        s = self.settings
        names = list(s.families) or legalize.default_families(self.analysis, target)
        for name in [*names, *s.widths]:
            if name not in target.ladders:
                raise MptkError(f"no family {name!r}; there are {', '.join(target.ladders)}")
            if len(target.ladders[name]) == 1:
                why = target.refused.get(name, "no narrower width is legal")
                raise MptkError(f"{name} cannot be cut for target {s.target}: {why}; try --target graph")
        target = fixed(target, s.widths)
        candidates = legalize.find_candidates(self.cost, target, [*dict.fromkeys([*names, *s.widths])], s.sparsity)
        if set(names) <= set(s.widths):
            if not candidates:
                raise MptkError(f"the stock class refuses these widths together: {target.accepts(s.widths)}")
            return candidates[:1]
        return legalize.choose_candidates(candidates, s.sparsity, s.tolerance, SPLITS)

    # ---- choosing ----

    def _plan(self) -> None:
        """Score units on calibration text and keep the best, dividing the budget as the text likes it best."""
        s = self.settings
        with self._stage("calibration text"):
            self.windows, self.eval_windows, self.eval_source = self._text()
        if s.plan is not None:
            self.plan = Plan.load(s.plan)
            return
        names = list(self.candidates[0].widths)
        with self._stage(f"score ({s.method})"):
            evidence = criteria.gather(
                self.analysis,
                s.method,
                self.windows,
                families=names,
                seed=s.seed,
                progress=lambda done, total: self.progress(f"score ({s.method})", done, total),
            )
            scores = criteria.score_evidence(evidence, s.method, names)
        plans = [criteria.select(self.analysis, scores, self._cut_only(c.widths)) for c in self.candidates]
        with self._stage("choose widths"):
            best = self._best(plans)
        self.plan = self._meta(plans[best])
        if criteria.find_criterion(s.method).compensates:
            self._compensate(evidence)

    def _best(self, plans: Sequence[Plan]) -> int:
        """Index of the plan whose masked program has the lowest loss on a part of the calibration text."""
        text = self.windows[: max(1, 1024 // self.windows.shape[1])]
        losses = []
        for i, plan in enumerate(plans):
            masked = mask(self.analysis, resolve_plan(self.analysis, plan))
            losses.append(loss(masked, text))
            self.progress("choose widths", i + 1, len(plans))
        self.losses = {legalize.describe(p.widths): round(x, 4) for p, x in zip(plans, losses, strict=True)}
        return min(range(len(plans)), key=lambda i: losses[i])

    def _compensate(self, evidence: criteria.Evidence) -> None:
        """FLAP: the removed channels' mean contribution goes into the consumers' biases, in the dense program."""
        result = criteria.compensate(self.analysis, self.plan, evidence.observations)
        self.notes.append(result.statement)
        self.compensation = result.state

    def _cut_only(self, widths: Mapping[str, int]) -> dict[str, int]:
        return {name: w for name, w in widths.items() if w < self.analysis.family(name).size}

    def _meta(self, plan: Plan) -> Plan:
        s = self.settings
        return Plan(plan.families, {"model": self.source, "method": s.method, "sparsity": s.sparsity, "seed": s.seed})

    def _text(self) -> tuple[Tensor, Tensor, str]:
        """Calibration windows [n, length], and windows to measure perplexity on, with their source."""
        s = self.settings

        def say(done: int, total: int) -> None:
            self.progress("calibration text", done, total)

        tokenizer = self.loaded.tokenizer
        if s.data == "self" and s.eval_data is None:
            both = data.calibration(self.model, tokenizer, "self", 2 * s.samples, s.length, seed=s.seed, progress=say)
            return both[: s.samples], both[s.samples :], "sampled from the dense model"
        windows = data.calibration(self.model, tokenizer, s.data, s.samples, s.length, seed=s.seed, progress=say)
        source = s.eval_data or s.data
        held_out = data.evaluation_windows(tokenizer, source, s.eval_length, s.eval_windows)
        return windows, held_out, source

    # ---- cutting and writing ----

    def _emit(self, folder: Path) -> None:
        self.dense = self.program.with_state(self.compensation)
        self.compensated = group.analyze(self.dense) if self.compensation else self.analysis
        self.pruned, epsilons = cut_program(self.compensated, self.plan, self.log)
        self.plan.save(folder / "plan.json")
        if self.compensation:
            save_file(dict(self.compensation), folder / "compensation.safetensors")
        with self._stage("write checkpoint"):
            self.stock = self._stock(epsilons)
            if self.stock is None:
                save_file({n: t.contiguous() for n, t in self.pruned.state.items()}, folder / "model.safetensors")
            else:
                write_checkpoint(self.pruned.state_dict(), self.stock, self.model, None, folder, portable=portable)
            if self.loaded.tokenizer is not None:
                save_tokenizer(self.loaded.tokenizer, folder)
        if self.settings.onnx:
            with self._stage("export ONNX"):
                self._emit_onnx(folder / "onnx")

    def _stock(self, epsilons: Mapping[float, float]) -> StockConfig | None:
        if self.settings.target != "stock":
            return None
        found = legalize.discover(self.analysis, self.model).config(self.plan.widths, scalars=epsilons)
        if isinstance(found, StockConfig):
            return found
        if self.settings.rehome and found.config is not None:
            check = logits_check(self.pruned, self.windows[:1])
            shapes = legalize.cut_shapes(self.analysis, self.plan.widths)
            other = rehome(found.config, shapes, check, tolerance=TOLERANCE)
            if isinstance(other, StockConfig):
                self.notes.append(f"written as {other.model_class.__name__}, with equal logits, since {found}")
                return other
            raise MptkError(f"the stock class refuses these widths: {found}; no other class will do: {other}")
        home = find_home(self.analysis, self.model, self.plan.widths)
        hint = "" if home is None else f", or give --rehome: {home} holds them with equal logits"
        raise MptkError(f"the stock class refuses these widths: {found}; choose others or use --target graph{hint}")

    def _emit_onnx(self, folder: Path) -> None:
        """From the compiler's own graph of a decoding step: the dense model's weights, cut by the same plan."""
        try:
            folder.mkdir()
            with replaced(self.model, self.compensation):
                export(self.model, folder, plan=self.plan, source=self.source)
        except MptkError as error:
            folder.rmdir()
            self.notes.append(f"no ONNX: {error}")

    # ---- proof ----

    def _prove(self, folder: Path) -> None:
        with self._stage("prove"):
            masked = mask(self.compensated, resolve_plan(self.compensated, self.plan))
            self.tokens = self.windows[: PROOF_SHAPE[0], : PROOF_SHAPE[1]]
            stages = proof_stages(self.pruned, folder, self.stock is not None)
            self.proof = prove(masked, stages, self.tokens)
        require(self.proof, "nothing was published. Please report this model")

    def _perplexity(self) -> dict[str, Any]:
        """Dense and pruned perplexity on the evaluation windows."""
        result: dict[str, Any] = {}
        for name, run in (("dense", self.program), ("pruned", self.pruned)):

            def say(done: int, total: int, stage: str = f"perplexity ({name})") -> None:
                self.progress(stage, done, total)

            measured = perplexity(run, self.eval_windows, data=self.eval_source, progress=say)
            result[name], result["protocol"] = round(measured.value, 4), measured.protocol
        return result

    def _report(self, folder: Path) -> dict[str, Any]:
        with self._stage("perplexity"):
            quality = self._perplexity()
        dense, pruned = self.cost.dense, self.cost(self.plan.widths)
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        return {
            "format": REPORT,
            "mptk": mptk.__version__,
            "model": self.source,
            "settings": asdict(self.settings),
            "families": {
                f.name: {"of": f.size, "width": self.plan.widths.get(f.name, f.size), "layers": len(f.groups)}
                for f in self.analysis.families
            },
            "sparsity": 1 - pruned.block / dense.block,
            "cost": {"dense": dense.as_dict(), "pruned": pruned.as_dict()},
            "splits": self.losses,
            "perplexity": quality,
            "proof": [d.as_dict() for d in self.proof],
            "proof_tokens": self.tokens.tolist(),
            "config_changes": {} if self.stock is None else {k: list(v) for k, v in self.stock.changes.items()},
            "plan_sha256": plan_digest(self.plan),
            "notes": [n for n in self.notes if n],
            "stages": self.log.as_list(),
            "files": [*files, "report.json"],
        }

    def _stage(self, name: str) -> Any:
        self.progress(name, 0, 0)
        return self.log.stage(name)


def find_target(analysis: Analysis, model: Any, target: str, multiple: int) -> legalize.Target:
    """Legal widths for ``stock`` (the model's own transformers class) or ``graph`` (what the graph's ops accept)."""
    if target == "graph" or not isinstance(model, PreTrainedModel):
        return legalize.graph_target(analysis, multiple)
    if target != "stock":
        raise MptkError(f"no target {target!r}; choose stock or graph")
    return legalize.stock_target(analysis, model, multiple)


def fixed(target: legalize.Target, widths: Mapping[str, int]) -> legalize.Target:
    """The target with some families' widths given. Raises MptkError for one that is not legal."""
    for name, width in widths.items():
        if width not in target.ladders[name]:
            legal = target.ladders[name]
            near = sorted(legal, key=lambda w: abs(w - width))[:3]
            raise MptkError(f"{name} cannot have width {width}; the nearest legal ones are {sorted(near)}")
    ladders = {n: (widths[n],) if n in widths else ladder for n, ladder in target.ladders.items()}
    return legalize.Target(ladders, target.refused, target.accepts)


def loss(program: Program, windows: Tensor) -> float:
    """Mean next-token cross entropy, nats."""
    with torch.no_grad():
        logits = program(windows)
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))


class replaced:
    """Lend a module other values for some parameters."""

    def __init__(self, model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if name in state}
        self.state, self.saved = state, {name: p.data for name, p in self.parameters.items()}

    def __enter__(self) -> None:
        for name, p in self.parameters.items():
            p.data = self.state[name]

    def __exit__(self, *_: object) -> None:
        for name, p in self.parameters.items():
            p.data = self.saved[name]


def proof_stages(pruned: Program, folder: Path, checkpoint: bool) -> dict[str, tuple[Logits, float]]:
    """The stages that there are to prove: the rewritten graph, the reloaded checkpoint, ONNX prefill and decode."""
    stages: dict[str, tuple[Logits, float]] = {"rewritten graph": (pruned, TOLERANCE)}
    if checkpoint:
        reloaded = models.load(str(folder)).model
        stages["reloaded checkpoint"] = (lambda ids: reloaded(ids, use_cache=False).logits, TOLERANCE)
    if (folder / "onnx").is_dir():
        decoder = OrtDecoder(folder / "onnx")
        stages["ONNX Runtime prefill"] = (
            lambda ids: torch.from_numpy(decoder.prefill(ids.numpy())[0]),
            RUNTIME_TOLERANCE,
        )
        stages["ONNX Runtime decode"] = (lambda ids: decoded(decoder, ids), RUNTIME_TOLERANCE)
    return stages


def decoded(decoder: OrtDecoder, ids: Tensor) -> Tensor:
    """Logits of the last ``DECODED`` positions, each from a decoding step with the cache of those before."""
    _, cache = decoder.prefill(ids[:, :-DECODED].numpy())
    steps = []
    for position in range(ids.shape[1] - DECODED, ids.shape[1]):
        logits, cache = decoder.decode(ids[:, position : position + 1].numpy(), cache)
        steps.append(torch.from_numpy(logits.copy()))
    return torch.cat(steps, 1)


def require(proof: Sequence[Difference], remedy: str) -> None:
    """Raise MptkError for the first stage above its tolerance, with what to do about it."""
    for d in proof:
        if not d.ok:
            raise MptkError(
                f"the proof fails at '{d.stage}': logits differ by {d.max_abs:.2g} ({d.relative:.1e} of the largest, "
                f"tolerance {d.tolerance:.0e}); {remedy}"
            )


def verify(folder: str | Path, *, model: str | None = None) -> list[Difference]:
    """Prove a pruned folder again, from the dense model and ``plan.json``; returns each stage's difference.

    Args:
        folder: an ``--out`` folder of ``prune``.
        model: the dense model, where it is no longer where the report says.

    Raises:
        MptkError: the folder or the dense model is missing, or a stage is above its tolerance.
    """
    folder = Path(folder)
    plan = plan_of(folder)
    report = read_report(folder)
    loaded = models.load(model or report["model"], trust_remote_code=report["settings"]["trust_remote_code"])
    program = passes.trace.trace(loaded.model, dynamic=True)
    if (folder / "compensation.safetensors").is_file():
        program = program.with_state(load_file(folder / "compensation.safetensors"))
    analysis = group.analyze(program)
    pruned, _ = cut_program(analysis, plan, pipeline.Log())
    stages = proof_stages(pruned, folder, report["settings"]["target"] == "stock")
    tokens = torch.tensor(report["proof_tokens"])
    proof = prove(mask(analysis, resolve_plan(analysis, plan)), stages, tokens)
    require(proof, "do not use it, and prune the model again")
    return proof


def read_report(folder: str | Path) -> dict[str, Any]:
    """``report.json`` of a pruned folder. Raises MptkError if there is none."""
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise MptkError(f"{folder} holds no report.json; give the --out folder of `mptk prune`")
    report: dict[str, Any] = json.loads(path.read_text())
    return report
