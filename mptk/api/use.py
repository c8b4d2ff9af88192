"""use: ``mptk.evaluate`` and ``mptk.generate``, for a pruned or dense model in a folder or in memory; `mptk eval`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mptk.api.pruned import Pruned, Shown, report_progress
from mptk.api.words import wrap_public
from mptk.compat.torch import forget_sources
from mptk.compile.trace import LONGEST_TRACE, fit_to_program, trace_loaded
from mptk.config import IN_MEMORY, Settings, with_keywords
from mptk.conversions import convert_model, read_plan_conversions
from mptk.errors import InputError, ModelError, explain_errors
from mptk.io import (
    LogitsFn,
    Perplexity,
    Resident,
    evaluation,
    find_position_limit,
    models,
    open_dense,
    set_evaluating,
    unwrap_parallel,
)
from mptk.io import data as text
from mptk.ir import Log, Program, Samples
from mptk.ort.generation import Sampling, TextGenerator, check_room, encode_prompts
from mptk.progress import Count, Progress, show_nothing
from mptk.proof.verification import read_folder_plan
from mptk.protocols import (
    REPORT_FILE,
    Analysed,
    Context,
    Report,
    SampleSets,
    Task,
    build_executor,
    find_device,
    find_session_device,
)
from mptk.reading import Json
from mptk.run.given import check_fits, collect_samples, find_texts
from mptk.run.inputs import Data, GivenInputs, Inputs, is_in_memory, name_given
from mptk.run.open import Model, open_in_memory, open_model
from mptk.run.samples import draw_evaluation
from mptk.staged.staged import Executor
from mptk.tasks import CAUSAL_LM, find_folder_task, find_task, load_decoder, load_folder_inputs
from mptk.tasks.inputs.text import make_text_rows
from mptk.tasks.module import Module
from mptk.trust import Trust, trust_by_caller
from passes.analysis import group


@wrap_public
@forget_sources()
def evaluate(
    model: Pruned | Model,
    data: Data | None = None,
    *,
    dense: Model | None = None,
    windows: int = Settings.eval_windows,
    length: int = Settings.eval_length,
    tokenizer: PreTrainedTokenizerBase | None = None,
    example_inputs: GivenInputs | None = None,
    memory: int | None = None,
    device: str = Settings.device,
    trust_remote_code: bool = False,
    progress: Shown = "auto",
) -> Json:
    """Measure a model's quality by the metric of its kind: perplexity, accuracy, distance from the dense model, …

    Args:
        model: a ``Pruned``, an ``--out`` folder of ``prune``, or what ``prune`` takes.
        data: as in ``prune``. None: the example inputs of a ``Pruned`` that was a plain module.
        dense: the dense model to measure beside it. A pruned model knows its own, which is used if the metric is a
            distance from the dense model's outputs, and always for a ``Pruned`` from ``prune``.
        windows, length: as ``eval_windows`` and ``eval_length`` of ``Settings``.

    Returns:
        Always ``model``: its value; ``dense``: the dense model's, None if it was not measured; ``metric``;
        ``protocol``. Of some kinds further figures, each by its name, for the same models.

    Raises:
        MptkError: there is no data, or the metric needs a dense model and there is none.
    """
    settings = Settings(eval_windows=windows, eval_length=length, memory=memory, device=device)
    # As ``eval_data``, too: nothing is fitted to it, so no part is set aside.
    settings = with_keywords(settings, name_given(data=data, eval_data=data))
    resident, executor = build_executor(settings)
    with explain_errors(), report_progress(progress) as say:
        say("load", 0, 0)
        trust = trust_by_caller(trust_remote_code)
        # Open the models, then read samples by the first one's task, then trace for these samples.
        runs = _Programs(resident, executor, trust, tokenizer, example_inputs)
        runs.add(model, dense)
        (loaded, task), texts = runs.opened[0], None
        if is_in_memory(data):
            texts, given = find_texts(data, loaded, task)
            if texts is None:
                samples = collect_samples(given, loaded, task, windows, length)
            else:
                samples = make_text_rows(loaded, islice(texts, windows), length)
        elif data is None and task.sequences:
            raise InputError("evaluate needs data to measure on; give data", name="data")
        else:
            samples = draw_evaluation(loaded, task, settings)
        samples = runs.trace(samples)
        if is_in_memory(data) and texts is None:
            check_fits(samples, next(iter(runs.programs.values())))
        source = IN_MEMORY if data is None or is_in_memory(data) else task.name_data(loaded.model, str(data))
        sets = SampleSets(samples, samples, samples, source, task.sequences)
        found = task.measure_quality(runs, sets, say)
        return {"model": found["model"], "dense": None, **found}


def is_text_decoder(model: str, *, trust: Trust) -> bool:
    """Whether the model is measured as a text decoder. Raises MptkError if no task takes it."""
    folder = Path(model)
    if (folder / REPORT_FILE).is_file() and Report.read(folder).task == Module.name:
        return False
    return find_task(model, trust=trust) is CAUSAL_LM


@dataclass(eq=False)
class _Programs:
    """Programs to measure side by side, by name. Calling it makes it a ``mptk.io.evaluation.Runs``.

    ``modules``: the modules that run instead of programs that take only one length.
    """

    resident: Resident
    executor: Executor
    trust: Trust
    tokenizer: PreTrainedTokenizerBase | None
    example_inputs: GivenInputs | None
    names: list[str] = field(default_factory=list)
    programs: dict[str, Program] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    opened: list[tuple[models.Loaded, Task]] = field(default_factory=list)

    def add(self, model: Pruned | Model, dense: Model | None) -> None:
        """Add the programs of a model and of its dense model, if one is given, known or needed."""
        # A result of this process has both models, and if its weights did not change, their programs too.
        if isinstance(model, Pruned) and model.compiled is not None and dense is None:
            prepared = model.compiled.prepared
            changed = model.changed
            model.check_dense()
            if changed:
                self._take("dense", (prepared.compared, prepared.task))
                self._take("model", self._open_present(model))
                return
            self.opened.append((prepared.loaded, prepared.task))
            self.programs = {"dense": prepared.reference, "model": model.compiled.program}
            if prepared.task.find_fixed_length(prepared.analysis.program) is not None:
                self.modules = {"dense": prepared.compared.load_all(), "model": model.present}
            return
        # The model itself: from memory if its weights changed or no class can load the folder, else from the folder.
        place = model.proven if isinstance(model, Pruned) else model
        present = isinstance(model, Pruned) and (model.changed or not (model.proven / "config.json").is_file())
        small = self._open_present(model) if isinstance(model, Pruned) and present else self._open(place)
        # Its dense model: the given one, or the report's if the metric needs one.
        report = None
        if isinstance(place, str | Path) and (Path(place) / REPORT_FILE).is_file():
            report = Report.read(place)
        if dense is not None:
            self._take("dense", self._match_tokens(self._open(dense), place))
        elif small[1].compares:
            if report is None:
                raise InputError(
                    f"a {small[1].summary} is measured by its distance from the dense model; give the dense model as "
                    "dense",
                    name="dense",
                )
            loaded = open_dense(report.model, report.model_sha256, None, self.trust, self.resident, live=report.live)
            self._take("dense", self._match_tokens((loaded, find_folder_task(Path(str(place)), report, loaded)), place))
        self._take("model", small)

    def _open(self, model: Model) -> tuple[models.Loaded, Task]:
        # The folder of a plain module has its example inputs.
        inputs = self.example_inputs
        if inputs is None and isinstance(model, str | Path) and (Path(model) / REPORT_FILE).is_file():
            inputs = load_folder_inputs(Path(model), Report.read(model))
        opened = open_model(model, self.resident, self.trust, Inputs(self.tokenizer, inputs))
        return opened.loaded, opened.task

    def _open_present(self, pruned: Pruned) -> tuple[models.Loaded, Task]:
        """A pruned model with the weights that it has in memory."""
        inputs = self.example_inputs
        inputs = load_folder_inputs(pruned.proven, pruned.report) if inputs is None else inputs
        words = self.tokenizer or pruned.tokenizer
        opened = open_in_memory(pruned.present, self.trust, Inputs(words, inputs))
        return opened.loaded, opened.task

    def _match_tokens(self, dense: tuple[models.Loaded, Task], place: Model) -> tuple[models.Loaded, Task]:
        """The dense model with the tokens of a pruned folder, so that both read the same ids."""
        if not isinstance(place, str | Path) or not (Path(place) / "plan.json").is_file():
            return dense
        # Conversions that fit weights change what the model computes, and quality is compared with the model before.
        changes = [(kind, change) for kind, change in read_plan_conversions(read_folder_plan(place)) if not kind.fits]
        if not changes:
            return dense
        model = Analysed(*dense, group.analyze_program(trace_loaded(*dense, self.executor)))
        model, _ = convert_model(model, changes, Context(Log(), show_nothing), self.executor, LONGEST_TRACE)
        return model.loaded, model.task

    def _take(self, name: str, opened: tuple[models.Loaded, Task]) -> None:
        self.opened.append(opened)
        self.names.append(name)

    def trace(self, samples: Samples) -> Samples:
        """Trace the models that ``add`` opened, for these samples. Returns batches of a size that the programs take."""
        for name, (loaded, task) in zip(self.names, self.opened, strict=False):  # a Pruned in memory has its programs
            self.programs[name] = trace_loaded(loaded, task, self.executor, like=samples)
            if task.find_fixed_length(self.programs[name]) is not None:
                self.modules[name] = loaded.load_all()
        # Models of text take any number of windows. Other programs may hold for one number of samples only.
        task = self.opened[0][1]
        for program in self.programs.values() if not task.sequences else ():
            samples = fit_to_program(task, program, samples, "data")
        return samples

    def __call__(self, batches: Sequence[Samples], progress: Count) -> Iterator[tuple[str, int, Tensor]]:
        names, task = list(self.programs), self.opened[0][1]
        if self.modules:  # programs of one length; a module takes any
            for i, batch in enumerate(batches):
                for name in names:
                    # not around the yield, where it would hold for the caller
                    with torch.no_grad(), set_evaluating(self.modules[name]):
                        output = task.compute_output(self.modules[name], batch)
                    yield name, i, output
                progress(i + 1, len(batches))
            return
        # One pass through the stages of all programs: weights of a large model are read only once.
        found = self.executor.run_programs(list(self.programs.values()), [batch.tensors for batch in batches], progress)
        for i in range(len(batches)):
            for name in names:
                yield name, i, next(found)


@wrap_public
def generate(
    model: Pruned | str | Path | nn.Module,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    threads: int = 0,
    device: str = Settings.device,
) -> list[str]:
    """Generate text with a language model after each of ``prompts``.

    Args:
        model: a folder with ``onnx`` in it (from ``prune`` or ``export``) or an ``.onnx`` file, which run in ONNX
            Runtime; or a ``Pruned`` or a transformers model in memory, which run in torch if they have no ONNX.
        temperature, top_k, top_p, seed: as in ``mptk.ort.generation.Sampling``; temperature 0 takes the likeliest
            token.
        chat: put each prompt into the model's chat template.
        tokenizer: for a model in memory.
        threads, device: for ONNX Runtime; 0 threads: all cores.

    Returns:
        The new text for each prompt, without the prompt, of at most ``max_new_tokens`` tokens.

    Raises:
        MptkError: the model has no tokenizer or is not a decoder; or prompt and new tokens exceed its positions.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    model = unwrap_parallel(model) if isinstance(model, nn.Module) else model
    sampling = Sampling(temperature, top_k, top_p)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; give 1 or more", name="max_new_tokens")
    # In ONNX Runtime, all prompts at once.
    place = _find_graphs(model)
    if place is not None:
        runner = TextGenerator(place, threads=threads, device=find_session_device(device))
        encoded = encode_prompts(runner.tokenizer, prompts, chat=chat)
        steps = runner.stream(encoded, limit=max_new_tokens, sampling=sampling, seed=seed)
        rows = [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
        return [str(runner.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    # In torch, one prompt after the other: `generate` of transformers would need padding.
    module: object = model.model if isinstance(model, Pruned) else model
    words = tokenizer or (model.tokenizer if isinstance(model, Pruned) else None)
    if not isinstance(module, PreTrainedModel):
        raise ModelError(
            f"a {type(module).__name__} cannot generate text; give a language model of transformers",
            name=type(module).__name__,
        )
    if words is None:
        raise InputError("prompts need a tokenizer, and the model has none; give tokenizer=", name="tokenizer")
    encoded = encode_prompts(words, prompts, chat=chat)
    with set_evaluating(module):
        return [_generate_text(module, words, ids, max_new_tokens, sampling, seed) for ids in encoded]


def generate_continuations(
    folder: Path, prompts: Sequence[str], tokens: int, dense: str | None, trust: Trust
) -> dict[str, list[str]]:
    """What the dense and the pruned model of a folder write after each prompt, greedily.

    Returns:
        The texts of ``dense`` and of ``pruned``. The argument ``dense`` names the dense model, if it has moved.

    Raises:
        MptkError: as ``generate``; or the dense model is not found, or is another one.
    """
    pruned = Pruned.open(folder, trust_remote_code=trust.allows_code)
    report = pruned.report
    loaded = open_dense(report.model, report.model_sha256, dense, trust, Resident(0), live=report.live)
    whole, words = loaded.load_all(), loaded.tokenizer
    return {
        "dense": generate(whole, prompts, tokenizer=words, max_new_tokens=tokens),
        "pruned": generate(pruned, prompts, max_new_tokens=tokens),
    }


def _find_graphs(model: Pruned | str | Path | nn.Module) -> str | Path | None:
    """The place of the model's ONNX; None if it must run in torch."""
    if isinstance(model, Pruned):  # a graph holds no weights that were changed in memory
        return None if model.changed or not any(model.proven.glob("onnx/*.onnx")) else model.proven
    return None if isinstance(model, nn.Module) else model


def _generate_text(
    module: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    limit: int,
    sampling: Sampling,
    seed: int,
) -> str:
    """The text that a transformers module generates after a prompt of these token ids."""
    how: dict[str, object] = {"do_sample": False}
    if sampling.temperature:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    check_room(find_position_limit(module.config), [ids], limit)
    given = torch.tensor([ids], device=module.device)
    # transformers draws from torch's own generator, whose state is the caller's.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        written = module.generate(given, max_new_tokens=limit, **how)
    return str(tokenizer.decode(written[0, given.shape[1] :], skip_special_tokens=True))


def of_model(
    model: str,
    data: str | None,
    settings: Settings,
    progress: Progress,
    length: int,
    windows: int | None,
    tasks: Sequence[str],
    include_path: Path | None,
    limit: int | None,
) -> tuple[Perplexity | None, dict[str, dict[str, float]] | None]:
    """The perplexity of a decoder in torch on ``data``, and its results in ``tasks``; None if not asked for."""
    trust, measured, scores = settings.trust, None, None
    evaluation.check_trusted(include_path, trust)
    progress("load", 0, 0)
    there = find_device(settings.device)
    loaded = load_decoder(model, trust=trust)
    module = loaded.model.to(there)  # type: ignore[arg-type]
    if data is not None:
        text.check_length(loaded.model, length)
        held_out = text.load_evaluation_windows(loaded.tokenizer, data, length, windows)
        text.check_ids(loaded.model, held_out)
        measured = _measure_windows(lambda ids: module(ids.to(there), use_cache=False).logits, held_out, data, progress)
    if tasks:
        progress("lm-eval", 0, 0)
        scores = evaluation.zero_shot(loaded, tasks, include_path=include_path, limit=limit, trust=trust)
    return measured, scores


def of_graph(
    model: str, data: str, settings: Settings, progress: Progress, length: int, windows: int | None
) -> Perplexity:
    """The perplexity of an exported graph, plain or quantised, in ONNX Runtime."""
    progress("load", 0, 0)
    runner = TextGenerator(model, threads=settings.threads, device=find_session_device(settings.device))
    text.check_positions(runner.positions, length, f"windows of {length} tokens")
    held_out = text.load_evaluation_windows(runner.tokenizer, data, length, windows)
    runner.check_ids(held_out.flatten().tolist())
    return _measure_windows(runner.decoder.compute_torch_logits, held_out, data, progress)


def _measure_windows(logits: LogitsFn, windows: Tensor, data: str, progress: Progress) -> Perplexity:
    return evaluation.measure_perplexity(
        logits,
        windows,
        data=text.name_data(data),
        progress=lambda done, total: progress("perplexity", done, total),
    )
