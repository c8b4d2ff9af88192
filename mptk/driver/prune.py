"""prune: the main job, from a model's name to a proven folder.

trace → analyse → legalise → score or learn → choose widths → cut → recover → emit → prove → publish. Nothing is
published unless every stage of the proof is within its tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

import passes.frontend.trace
from mptk.cost.model import is_layered
from mptk.driver.api import export, plan_digest
from mptk.driver.budget import WidthSearch, budgeted
from mptk.driver.claims import weights_digest, widths
from mptk.driver.configs import check_code, config_changes
from mptk.driver.proof import Claim, check_proof, find_reach, proof_batches, prove_folder, witness
from mptk.driver.settings import MASKPRUNE, Settings
from mptk.driver.stock import find_stock
from mptk.driver.verification import REPORT, changes_of, read_report, widened
from mptk.errors import MptkError
from mptk.files import write_json
from mptk.io import data, models
from mptk.io.checkpoint import portable, save_tokenizer
from mptk.io.dense import absolute, fingerprint
from mptk.io.evaluation import LogitsFn, next_token_loss, perplexities
from mptk.io.manifest import listed
from mptk.io.publish import check_replaceable, publish
from mptk.ir.passes import Log
from mptk.ir.plan import Plan
from mptk.ir.resolved_plan import resolve_plan
from mptk.methods import criteria
from mptk.methods.maskprune.learner import Learner, removed_at_zero, take_over
from mptk.methods.maskprune.run_folder import WorkFolder
from mptk.methods.processes import describe, leads, processes
from mptk.methods.reconstruct import replaced
from mptk.progress import Progress, silent
from mptk.runtime.decoder import OrtDecoder
from mptk.version import __version__
from passes.analysis import group
from passes.pipelines import check_schemes, cut_program
from passes.targets import legalize
from passes.targets.stock.emit import write_checkpoint
from passes.transforms.masked_reference import mask
from passes.verify import Difference

DEFAULT_STEPS = 200


def prune(
    model: str, out: str | Path, settings: Settings | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Prune ``model`` and write the result to the folder ``out``; returns its report (also ``out/report.json``).

    Raises:
        MptkError: the model cannot be loaded, traced or cut; no legal widths meet the budget (said before any work);
            or a stage of the proof is above its tolerance. Then nothing is written.
    """
    return Run(model, Path(out), settings or Settings(), progress or silent).run()


class Run:
    """One run of ``prune``: the steps in order, each a method."""

    def __init__(self, model: str, out: Path, settings: Settings, progress: Progress) -> None:
        self.source, self.out = model, out
        self.progress: Progress = progress if leads() else silent
        steps = settings.learning.steps
        self.learns = settings.method == MASKPRUNE and settings.plan is None
        steps = (DEFAULT_STEPS if self.learns else 0) if steps is None else steps
        self.settings = replace(settings, learning=replace(settings.learning, steps=steps))
        self.steps = steps
        self.log = Log()
        self.notes: list[str] = []
        self.losses: dict[str, float] = {}
        self.changes: Mapping[str, Tensor] = {}
        self.trained: list[str] = []
        self.learner: Learner | None = None
        self.base: Path | None = None
        self.dense: Callable[[], models.Loaded] = lambda: models.load(
            model, trust_remote_code=settings.trust_remote_code, decoder=True
        )
        self.proof: list[Difference] = []

    def run(self) -> dict[str, Any]:
        self._prepare()
        work = self._work()
        self._text(work)
        self._start(work)
        self._plan()
        self._take_over()
        self._cut()
        self._recover()
        if not processes().is_main_process:
            return {}
        with publish(self.out) as folder:
            if work is not None:
                work.finish(folder)
            self._emit(folder)
            self._prove(folder)
            report = self._report(folder)
            write_json(folder / "report.json", report)
        if work is not None:
            work.remove()
        return report

    # ---- before anything is cut ----

    def _prepare(self) -> None:
        """Load, trace, analyse and find legal widths."""
        s = self.settings
        if s.method not in (MASKPRUNE, *criteria.CRITERIA):
            raise MptkError(f"no method {s.method!r}; choose one of {', '.join((MASKPRUNE, *criteria.CRITERIA))}")
        if self.learns and not self.steps:
            raise MptkError("maskprune learns in steps; give --steps, 100 or more, or a one-shot --method")
        if self.learns and not s.learning.rank:
            raise MptkError("masks are learned with LoRA; give --rank 1 or more; `mptk recover --rank 0` can follow")
        if self.learns and s.learning.precision == "fp16":
            raise MptkError("fp16 scales gradients, which masks are learned from; use --precision bf16 or no")
        if self.steps and s.target != "stock":
            raise MptkError("only a stock checkpoint can be trained after the cut; use --target stock, or no --steps")
        check_replaceable(self.out)
        check_schemes(s.quantize)
        with self._stage("load"):
            self.loaded = self.dense()
        self.model = self.loaded.model
        with self._stage("trace"):
            self.program = passes.frontend.trace.trace(self.model, dynamic=True)
        with self._stage("analyse"):
            self.analysis = group.analyze(self.program)
        with self._stage("legalise"):
            self.cost, self.settings = budgeted(self.analysis, s, self.progress)
            if s.plan is not None:
                self.plan = Plan.load(s.plan)
                resolve_plan(self.analysis, self.plan)
            self.candidates = (
                [] if s.plan else WidthSearch(self.analysis, self.cost, self.model, self.settings).candidates()
            )
        cut = self.plan.families if s.plan is not None else self.candidates[0].widths
        whole = [name for name in cut if not is_layered(self.analysis.family(name))]
        if self.steps and not s.learning.rank and whole:
            raise MptkError(f"all weights cannot be trained where {whole[0]} is cut, as norms follow it; use --rank 16")

    # ---- choosing ----

    def _work(self) -> WorkFolder | None:
        """The folder of the unfinished run, where there is something to train."""
        s = self.settings
        if not self.steps:
            return None
        settings = {k: v for k, v in asdict(s).items() if k not in ("resume", "proof_length")}
        return WorkFolder(self.out, {"model": self.source, **settings}, s.resume)

    def _start(self, work: WorkFolder | None) -> None:
        if work is not None:

            def say(phase: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
                self.progress(phase, done, total, "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))

            self.learner = Learner(self.model, self.training, self.settings.learning, work, say)
            self.notes.append(describe(self.learner.accelerator))

    def _plan(self) -> None:
        """Choose what is cut: from a file, by learning, or by scoring units and trying ways to divide the budget."""
        s = self.settings
        if self.base is not None:
            report = read_report(self.base)
            check_code(self.loaded.path, self.base)
            self.changes = changes_of(self.analysis, self.plan, self.base, report, s.trust_remote_code)
        elif s.plan is None and self.learns:
            assert self.learner is not None
            with self._stage("learn masks"):
                learned, self.changes, logits = self.learner.learn(
                    self.analysis, self.cost, self.candidates, 1 - s.sparsity, self.windows, self.tokens
                )
            self.trained = list(self.changes)
            self.plan = self._meta(learned)
            self._witness("learned masks", logits)
        elif s.plan is None:
            self._score()

    def _score(self) -> None:
        """Score units on calibration text and keep the best, dividing the budget as the text likes it best."""
        s = self.settings
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
            losses.append(next_token_loss(masked, text))
            self.progress("choose widths", i + 1, len(plans))
        self.losses = {legalize.describe(p.widths): round(x, 4) for p, x in zip(plans, losses, strict=True)}
        return min(range(len(plans)), key=lambda i: losses[i])

    def _compensate(self, evidence: criteria.Evidence) -> None:
        """FLAP: the removed channels' mean contribution goes into the consumers' biases, in the dense program."""
        result = criteria.compensate(self.analysis, self.plan, evidence.observations)
        self.notes.append(result.statement)
        self.changes = result.state

    def _take_over(self) -> None:
        """Fit what is left of each layer to what the dense layer gave."""
        s = self.settings
        if s.reconstruct if s.reconstruct is not None else self.learns:
            with self._stage("take over"):
                state = {**removed_at_zero(self.analysis, self.model, self.plan), **self.changes}
                self.changes = take_over(self.model, self.analysis, self.plan, state, self.windows, self.progress)
            self.trained = list(self.changes)

    def _cut_only(self, widths: Mapping[str, int]) -> dict[str, int]:
        return {name: w for name, w in widths.items() if w < self.analysis.family(name).size}

    def _meta(self, plan: Plan) -> Plan:
        s = self.settings
        return Plan(plan.families, {"model": self.source, "method": s.method, "sparsity": s.sparsity, "seed": s.seed})

    def _text(self, work: WorkFolder | None) -> None:
        """Calibration windows [n, length], training windows, windows to measure perplexity on, and their source."""
        s, steps = self.settings, self.steps

        def say(done: int, total: int) -> None:
            self.progress("calibration text", done, total)

        tokenizer, own = self.loaded.tokenizer, s.data == "self"
        # Only the first process makes the text; the others read it.
        with self._stage("calibration text"), processes().main_process_first() if work else nullcontext():
            saved = None if work is None else work.tensors("text")
            if saved is None:
                both = own and s.eval_data is None
                count = s.samples if own else max(s.samples, steps * s.learning.training.batch)
                text = data.calibration(
                    self.model, tokenizer, s.data, (1 + both) * count, s.length, seed=s.seed, progress=say
                )
                saved = {"training": text[:count], "evaluation": text[count:]}
                if work is not None:
                    work.save("text", saved)
            self.training, self.windows = saved["training"], saved["training"][: s.samples]
            (self.tokens,) = proof_batches(self.windows)
            if len(saved["evaluation"]):
                self.eval_windows, self.eval_source = saved["evaluation"], "sampled from the dense model"
            else:
                self.eval_source = s.eval_data or s.data
                self.eval_windows = data.evaluation_windows(tokenizer, self.eval_source, s.eval_length, s.eval_windows)

    # ---- cutting and writing ----

    def _cut(self) -> None:
        """The cut graph, and the stock class that holds it."""
        s = self.settings
        analysis = replace(self.analysis, program=self.program.with_state(self.changes))
        pruned, epsilons = cut_program(analysis, self.plan, self.log)
        written = None
        if s.target == "stock":
            found = (self.analysis, self.loaded, self.plan, pruned, epsilons)
            written = find_stock(*found, tokens=self.windows[:1], elsewhere=s.rehome)
        self.claim = Claim(analysis, self.plan, pruned, written, s.trust_remote_code)

    def _witness(self, stage: str, logits: Tensor) -> None:
        """Prove that the weights taken over from training are the trained model: by its own logits before that."""
        analysis = replace(self.analysis, program=self.program.with_state(self.changes))
        masked = mask(analysis, resolve_plan(analysis, self.plan))
        assert self.learner is not None
        self.proof.append(witness(stage, masked, logits, self.tokens, self.learner.tolerance))
        check_proof(self.proof, "nothing was published. Please report this model")

    def _recover(self) -> None:
        """Train the small model with the steps that are left, and take its weights over."""
        if self.learner is None:
            return
        steps = self.steps - (self.learner.mask_steps if self.learns else 0)
        assert self.claim.written is not None
        stock = self.claim.written.stock
        with self._stage("recover"):
            small: Any = stock.model_class(stock.config)
            small.load_state_dict(self.claim.pruned.state_dict())
            trained, logits = self.learner.recover(small.eval(), steps, self.tokens)
        known = {name: tensor for name, tensor in trained.items() if name in self.analysis.weights}
        self.model.cpu()
        self.changes = {**self.changes, **widened(self.claim.analysis, self.plan, known)}
        self.trained = list(self.changes)
        self._witness("trained model", logits)
        self._cut()

    def _emit(self, folder: Path) -> None:
        self.plan.save(folder / "plan.json")
        if self.changes and not self.trained:
            save_file(dict(self.changes), folder / "compensation.safetensors")
        with self._stage("write checkpoint"):
            pruned, written = self.claim.pruned, self.claim.written
            if written is None:
                save_file({n: t.contiguous() for n, t in pruned.state.items()}, folder / "model.safetensors")
            else:
                write_checkpoint(pruned.state_dict(), written.stock, self.model, None, folder, portable=portable)
                self.notes.append(written.note)
            if self.loaded.tokenizer is not None:
                save_tokenizer(self.loaded.tokenizer, folder)
        if self.settings.onnx:
            with self._stage("export ONNX"):
                self._emit_onnx(folder / "onnx")

    def _emit_onnx(self, folder: Path) -> None:
        """From the compiler's own graph of a decoding step: the dense model's weights, cut by the same plan."""
        try:
            folder.mkdir()
            with replaced(self.model, self.changes):
                s = self.settings
                export(
                    self.model,
                    folder,
                    plan=self.plan,
                    logits=s.logits,
                    quantize=s.quantize,
                    text=self.windows,
                    objective=s.objective,
                    source=self.source,
                )
        except MptkError as error:
            folder.rmdir()
            self.notes.append(f"no ONNX: {error}")

    # ---- proof ----

    def _prove(self, folder: Path) -> None:
        with self._stage("prove"):
            found = find_reach(self.claim, self.model.config, self.settings.proof_length)
            self.notes.append(found.note)
            self.reach = found.length
            batches = proof_batches(self.windows, found.length)
            self.proof += prove_folder(self.claim, folder, batches, found.borders)
        check_proof(self.proof, "nothing was published. Please report this model")

    def _quality(self, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Perplexity of the dense and the pruned graph, and size and perplexity of each quantised ONNX graph."""
        graphs = {scheme: folder / "onnx" / f"model_{scheme}.onnx" for scheme in self.settings.quantize}
        graphs = {scheme: file for scheme, file in graphs.items() if file.is_file()}
        runs: dict[str, LogitsFn] = {"dense": self.program, "pruned": self.claim.pruned}
        if self.settings.logits == "all":
            runs |= {scheme: OrtDecoder(file).torch_logits for scheme, file in graphs.items()}
        quality = perplexities(runs, self.eval_windows, data=self.eval_source, progress=self.progress)
        quantized: dict[str, Any] = {}
        for scheme, file in graphs.items():
            size = sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))
            quantized[scheme] = {"file": str(file.relative_to(folder)), "bytes": size}
            if scheme in quality:
                quantized[scheme]["perplexity"] = quality.pop(scheme)
        return quality, quantized

    def _report(self, folder: Path) -> dict[str, Any]:
        with self._stage("perplexity"):
            quality, quantized = self._quality(folder)
        dense, pruned = self.cost.dense, self.cost(self.plan.widths)
        return {
            "format": REPORT,
            "mptk": __version__,
            "model": absolute(self.source),
            "model_sha256": fingerprint(self.source, local=True),
            "settings": asdict(self.settings),
            "families": widths(self.analysis, self.plan),
            "sparsity": 1 - pruned.block / dense.block,
            "cost": {"dense": dense.as_dict(), "pruned": pruned.as_dict()},
            "splits": self.losses,
            "trained": self.trained,
            "weights_sha256": weights_digest(folder),
            "perplexity": quality,
            "quantized": quantized,
            "proof": [d.as_dict() for d in self.proof],
            "proof_tokens": self.tokens.tolist(),
            "proof_length": max(self.reach, self.tokens.shape[1]),
            "config_changes": {} if self.claim.written is None else config_changes(self.claim.written),
            "plan_sha256": plan_digest(self.plan),
            "notes": [n for n in self.notes if n],
            "stages": self.log.as_list(),
            "files": sorted([*listed(folder), "report.json"]),
        }

    def _stage(self, name: str) -> Any:
        self.progress(name, 0, 0)
        return self.log.stage(name)
