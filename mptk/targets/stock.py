"""stock: a plain checkpoint folder for transformers, of the model's own class or of another that can hold the cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mptk.errors import ProofError, TargetError
from mptk.files import make_scratch
from mptk.io import (
    CONFIG,
    GENERATION,
    Resident,
    copy_processors,
    list_other_files,
    make_portable_config,
    make_writer,
    models,
    read_object,
)
from mptk.ir import Alignment, Analysis, Log, Program, Samples, Weights, build_renumbering
from mptk.protocols import Checks, Compiled, Further, SampleSets, Target, Task, Written
from mptk.publish.manifest import list_files
from mptk.staged.staged import Executor
from mptk.targets.beside import (
    WeightFile,
    check_beside,
    check_keys,
    check_pipeline,
    check_weight_files,
    write_beside,
    write_pipeline,
)
from mptk.targets.graph import compare_stored
from mptk.targets.stock_config import check_code, check_written_config
from passes.frontend.trace import trace_to_program
from passes.targets import legalize
from passes.targets.legalize import LegalWidths, cut_shapes, find_graph_widths, find_stock_widths
from passes.targets.stock.config import StockConfig
from passes.targets.stock.emit import write_checkpoint
from passes.targets.stock.rehome import find_home, find_other_class, make_logits_check
from passes.targets.stock.travel import find_broken_programs
from passes.verify import TOLERANCE, StageOutputs

SHARD = 5 * 10**9
"""Largest file of weights by default, in bytes."""


class StockTarget(Target):
    """A transformers checkpoint: config, safetensors, tokenizer. It loads without mptk."""

    name = "stock"
    summary = "the model's own transformers class"
    classed = True
    companions = True

    def find_legal(self, analysis: Analysis, model: nn.Module, alignment: Alignment) -> LegalWidths:
        if not isinstance(model, PreTrainedModel):
            return find_graph_widths(analysis, alignment)
        return find_stock_widths(analysis, legalize.discover(analysis, model), alignment)

    def find_elsewhere(self, analysis: Analysis, legal: LegalWidths, alignment: Alignment) -> LegalWidths | None:
        return None if legal.stock is None else find_stock_widths(analysis, legal.stock, alignment, rehome=True)

    def name_home(
        self, analysis: Analysis, model: nn.Module, legal: LegalWidths, widths: Mapping[str, int]
    ) -> str | None:
        if legal.stock is None or not isinstance(model, PreTrainedModel):
            return None
        return find_home(analysis, legal.stock, model, widths)

    def fit(self, compiled: Compiled, sample: Samples) -> Written:
        """The model's own class with a new config or, if it refuses and ``rehome`` is set, another class.

        Raises:
            MptkError: the class refuses these widths, and ``rehome`` is not set or no other class can hold them.
        """
        # 1. The model's own class.
        prepared, widths = compiled.prepared, compiled.chosen.plan.widths
        analysis, loaded, stock = prepared.analysis, prepared.loaded, prepared.legal.stock
        assert stock is not None
        kept = build_renumbering(analysis, compiled.chosen.cut).kept
        found = stock.build_config(widths, scalars=compiled.epsilons, kept=kept)
        dtype = prepared.dtype
        if isinstance(found, StockConfig):
            if unread := prepared.settings.engines and find_broken_programs(
                found, models.read_stored_config(loaded), prepared.settings.engines
            ):
                raise TargetError(
                    f"this cut breaks {'; '.join(unread)}; cut other units, or name other --engines", name="engines"
                )
            return Written(found, loaded, found.config, dtype)
        # 2. Without the removed blocks it would hold the widths: then the blocks are the reason.
        if kept and isinstance(stock.build_config(widths, scalars=compiled.epsilons), StockConfig):
            raise TargetError(
                f"the stock class does not hold these blocks: {found}; keep others or use --target graph",
                name=self.name,
            )
        # 3. Another class, which must compute the same. Its candidates are causal language models.
        if prepared.settings.rehome and not kept and found.config is not None and list(sample.inputs) == ["input_ids"]:
            check = make_logits_check(compiled.program, sample.inputs["input_ids"])
            other = find_other_class(found.config, cut_shapes(analysis, widths), check)
            if isinstance(other, StockConfig):
                note = f"written as {other.model_class.__name__}, with equal logits, since {found}"
                return Written(other, loaded, found.config, dtype, note)
            raise TargetError(
                f"the stock class refuses these widths: {found}; no other class holds them: {other}", name=self.name
            )
        # 4. A refusal, with the class that --rehome would find.
        home = self.name_home(analysis, loaded.model, prepared.legal, widths)
        hint = "" if home is None else f", or give --rehome: {home} holds them with equal logits"
        raise TargetError(
            f"the stock class refuses these widths: {found}; choose others or use --target graph{hint}", name=self.name
        )

    def emit(self, compiled: Compiled, sets: SampleSets, folder: Path, log: Log) -> list[str]:
        assert compiled.written is not None
        _write(compiled, folder)
        write_pipeline(compiled.prepared.loaded, folder)
        beside = [each.note for each in compiled.written.companions]
        return [compiled.written.note, *beside, *self.list_limits(compiled)]

    def list_files(self, compiled: Compiled, folder: Path) -> frozenset[str]:
        # The checkpoint is written again, but for its weights: of these only names and headers are noted. Which files
        # it has depends on transformers, so no list here could say.
        held: dict[str, WeightFile] = {}

        def note(tensors: Mapping[str, object], file: str | Path, metadata: dict[str, str] | None = None) -> None:
            Path(file).touch()
            held[Path(file).name] = frozenset(tensors), metadata or {}

        with make_scratch() as place:
            _write(compiled, place.folder, lambda weights: note)
            for name in (CONFIG, GENERATION):
                if (place.folder / name).is_file() and (folder / name).is_file():
                    check_keys(name, read_object(folder / name), read_object(place.folder / name))
            check_weight_files(folder, held)
            return frozenset([*list_files(place.folder), *list_other_files(compiled.prepared.loaded.path)])

    def list_limits(self, compiled: Compiled) -> list[str]:
        """Notes on programs that do not read the folder."""
        assert compiled.written is not None
        reasons = find_broken_programs(compiled.written.stock, models.read_stored_config(compiled.prepared.loaded))
        return [f"this cut breaks {reason}; see docs/deploy.md" for reason in reasons]

    def has_written(self, folder: Path) -> bool:
        return (folder / "config.json").is_file()

    def make_checks(self, compiled: Compiled, folder: Path, crossed: Sequence[int]) -> Checks:
        assert compiled.written is not None
        # The files, without running anything: the code first, since a config may name classes of it.
        loaded, task = compiled.prepared.loaded, compiled.prepared.task
        check_code(loaded.path, folder)
        config = check_written_config(compiled.written, folder, loaded.trust)
        beside = partial(write_beside, loaded, same_features=keeps_features(compiled))
        check_beside(folder, beside, all_known=loaded.tokenizer is not None)
        check_pipeline(loaded, folder)
        check_written_tokenizer(compiled, folder)
        companions = [d for each in compiled.written.companions for d in each.check(compiled.written, folder)]
        # The weights, opened as transformers would, one at a time.
        executor = compiled.prepared.executor
        reloaded = models.open_weights(str(folder), Resident(0), trust=loaded.trust)
        assert reloaded.weights is not None
        weights = compare_stored(reloaded.weights, compiled.program.state_dict())
        # How the reloaded checkpoint runs: whole, as its class, if it fits into the memory of a stage. Else as a
        # program, stage by stage: traced like the samples of a task without sequences, or for any length of a text.
        further: dict[str, Further] = {}
        if sum(like.nbytes for like in reloaded.weights.likes.values()) <= executor.stage:
            model = reloaded.load_all()
            run: Program | StageOutputs = partial(task.compute_output, model)
            further = {"reloaded": Further(partial(task.compute_output, model), TOLERANCE)}
        elif not task.sequences:
            run = trace_like_samples(reloaded, task, executor)
        else:
            example, length = (
                task.make_example(reloaded.model),
                task.find_fixed_length(compiled.prepared.analysis.program),
            )
            if length is not None:
                example = example.of_length(length)
            dynamic = True if length is None else (0,)
            run = reloaded.with_weights(trace_to_program(reloaded.model, example.inputs, dynamic=dynamic))
        return Checks((config, weights, *companions), {"reloaded checkpoint": (run, TOLERANCE)}, further=further)


def _write(compiled: Compiled, folder: Path, save: Callable[[Weights], Callable[..., None]] = make_writer) -> None:
    """Write the checkpoint, and what prepares its inputs. ``save``: as of ``write_checkpoint``."""
    loaded, written = compiled.prepared.loaded, compiled.written
    assert written is not None
    beside = Weights({})
    for each in written.companions:
        beside = beside.with_entries(each.weights)
    write_checkpoint(
        compiled.program.state_dict().cast(compiled.prepared.dtype),
        written.stock,
        loaded.model,
        loaded.tokenizer,
        folder,
        portable=make_portable_config,
        max_shard_size=compiled.prepared.settings.max_shard_size or SHARD,
        beside=beside.cast(compiled.prepared.dtype),
        save=save,
    )
    copy_processors(loaded.path, folder, same_features=keeps_features(compiled))


def trace_like_samples(loaded: models.Loaded, task: Task, executor: Executor) -> StageOutputs:
    """The model's outputs, stage by stage as its class computes, by a trace of inputs like the first samples."""
    programs: list[Program] = []

    def run(samples: Samples) -> Tensor:
        if not programs:  # the first samples tell which sizes the others have
            example = task.choose_example(task.make_example(loaded.model), samples)
            sizes, wrap = task.open_sizes(example), task.choose_wrapper(loaded.model, example)
            programs.append(
                loaded.with_weights(trace_to_program(loaded.model, example.inputs, dynamic=sizes, wrap=wrap))
            )
        found: Tensor = next(executor.run_programs(programs, [samples.tensors]))
        return found

    return run


def keeps_features(compiled: Compiled) -> bool:
    """Whether the model's features have the same number of channels as before."""
    return "hidden" not in compiled.chosen.plan.families


def check_written_tokenizer(compiled: Compiled, folder: Path) -> None:
    """Raise ProofError unless the tokenizer in ``folder`` reads text as the dense model's, if that has one."""
    prepared = compiled.prepared
    if (dense := prepared.given.tokenizer) is not None:
        written = models.load_tokenizer(str(folder), trust=prepared.loaded.trust)
        kept = next((each.tokens for each in prepared.conversions if each.tokens is not None), None)
        check_same_reading(dense, written, kept)


RARE = 64
"""Number of tokens with the highest ids to compare. The lowest ids are letters, which occur in every text."""
SPECIAL = 64
"""Number of added and special tokens to compare."""


def check_same_reading(
    dense: PreTrainedTokenizerBase, written: PreTrainedTokenizerBase, kept: Sequence[int] | None
) -> None:
    """Raise ProofError unless both encode texts to the same tokens and decode these to the same texts.

    ``kept``: the ids of ``dense`` that stay, in the order of the written ids; None: all.
    """
    # ``verbose`` would warn of texts longer than the model's positions.
    new = None if kept is None else {old: i for i, old in enumerate(kept)}
    for text in make_texts(dense, kept):
        ids = dense(text, verbose=False).input_ids
        if new is not None and not new.keys() >= set(ids):
            continue  # a removed token: the written tokenizer splits it into others
        expected = ids if new is None else [new[i] for i in ids]
        found = written(text, verbose=False).input_ids
        if found != expected:
            raise ProofError(
                f"the proof fails at 'config': the written tokenizer reads {text!r} as {found}, not as {expected}; do "
                "not use it, and prune the model again",
                name="config",
            )
        if written.decode(found) != dense.decode(ids):
            raise ProofError(
                f"the proof fails at 'config': the written tokenizer writes the tokens of {text!r} as "
                f"{written.decode(found)!r}; do not use it, and prune the model again",
                name="config",
            )


def make_texts(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int] | None) -> Iterator[str]:
    """Texts of added and special tokens, by themselves and within words, and of rare tokens."""
    # A special token within a word shows whether the tokenizer strips spaces around it.
    added = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens})[:SPECIAL]
    for token in added:
        yield token
        yield f"one {token} two{token}three"
    ids = range(len(tokenizer)) if kept is None else kept
    for i in ids[-RARE:]:
        if text := str(tokenizer.decode([i])):
            yield text
