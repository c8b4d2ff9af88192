"""pruned: ``mptk.prune`` and ``mptk.recover``, and their result ``Pruned``: a model, its plan and its report."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal, NoReturn, SupportsIndex, Unpack

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from mptk.api.changed import FirstRun, Snapshot, check_same, read_saved_files, write_again
from mptk.api.display import show_progress
from mptk.api.keywords import PruneKeywords, RecoverKeywords
from mptk.api.words import wrap_public
from mptk.arguments import TURN
from mptk.config import IN_MEMORY, Settings, with_keywords
from mptk.cost.estimate import Estimate
from mptk.errors import ChangedError, FileError, InputError, MptkError, OutputError
from mptk.files import format_json, make_scratch, make_write_error
from mptk.io import find_stored_dtype, forget_folder, models, resolve_model_name, unwrap_parallel
from mptk.ir import Log, PassRecord, Plan
from mptk.methods import find_method
from mptk.notebook import build_line
from mptk.progress import Progress, show_nothing
from mptk.proof.claims import LATER
from mptk.proof.verification import read_folder_plan
from mptk.protocols import Compiled, Context, Opened, Report, check_dense, check_given_tokenizer
from mptk.publish.folder import check_replaceable, publish
from mptk.publish.manifest import check_listed, check_manifest, copy_listed, read_manifest
from mptk.run.estimate import read_estimator
from mptk.run.given import check_texts
from mptk.run.inputs import Data, GivenInputs, Inputs, name_given, split_texts
from mptk.run.minutes import complete_settings
from mptk.run.open import Model, name_start, take_model
from mptk.run.prune import Result
from mptk.run.prune import run_prune as prune_model
from mptk.run.pruned_folder import PrunedFolder
from mptk.run.run import Start, open_run
from mptk.targets.archive import ARCHIVE, open_archive
from mptk.targets.graph import read_weights
from mptk.trust import trust_by_caller

Shown = Progress | Literal["auto"] | None
"""Where to show progress: bars on a terminal and in a notebook (``auto``), a function, or nowhere (None)."""


class Pruned:
    """A pruned model, proven. ``prune`` and ``recover`` make it; ``Pruned.open`` reads a folder.

    Weights of ``model`` that were changed since, for example by training, count everywhere: in ``save``, ``place``,
    ``mptk.evaluate``, ``mptk.generate``, ``mptk.export`` and ``mptk.recover``. ``save`` and ``place`` prove them anew.
    All else that was changed, in memory or in the folder, is refused by all of these alike, by its name. A model that
    was converted (``half()``) counts with its numbers, in the types of the folder.

    Attributes:
        plan: the units that were kept.
        report: what ``report.json`` says: settings, widths, costs, quality, proof.
        folder: where it was written; None if it was not written.
        proven: the folder whose files were proven, which may be temporary; ``model`` may have later weights.
    """

    def __init__(
        self,
        report: Report,
        place: Path,
        *,
        compiled: Compiled | None = None,
        kept: object = None,
        origin: FirstRun | None = None,
    ) -> None:
        """``place``: the folder. ``kept``: for a temporary folder, the object that removes it at the end.

        ``origin``: what is known of the run that made it.
        """
        place = place.absolute()  # the current folder may change
        self.report, self.plan = report, read_folder_plan(place)
        # To see later whether the report or the folder was changed (`_check_result`).
        self._reported, self._files = format_json(report.to_json()), read_manifest(place)
        self.compiled = compiled
        origin = origin or FirstRun()
        if isinstance(origin.model, str):
            origin = replace(origin, model=resolve_model_name(origin.model))
        self.proven, self._kept, self._origin = place, kept, origin
        # Model and tokenizer are opened at first use, each with what it was like then.
        self._model: nn.Module | None = None
        self._snapshot: Snapshot | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenizer_files: dict[str, bytes] | None = None
        self.folder: Path | None = place if kept is None else None

    @staticmethod
    @wrap_public
    def open(
        folder: str | Path, *, model: str | Path | nn.Module | None = None, trust_remote_code: bool = False
    ) -> Pruned:
        """The result in an ``--out`` folder of ``prune``. Raises MptkError if it is not as it was published.

        ``model``: the dense model, if it has moved or was pruned in memory. Only changed weights need it, to be proven.
        ``trust_remote_code``: whether the model's own Python code may run; the folder's report does not decide this.
        """
        report = Report.read(folder)
        check_manifest(Path(folder))
        dense = str(model) if isinstance(model, Path) else model
        return Pruned(report, Path(folder), origin=FirstRun(model=dense, trust=trust_by_caller(trust_remote_code)))

    @property
    def model(self) -> nn.Module:
        """The small model, in evaluation mode, to run, train and save.

        For the target ``stock`` it has a stock transformers class, in the type of the stored weights, as
        ``from_pretrained`` loads it; for ``nemotron-nas`` the class that is in the folder. For a plain ``nn.Module``
        and for the target ``graph`` it is a module with the cut parameters under their old names and the traced
        ``forward`` (``ir/program.py``), in the module's own types; a transformers model becomes float32.

        Raises:
            MptkError: a file of the folder is damaged, missing or another one.
        """
        if self._model is None:
            with TURN.take():
                if self._model is None:  # no other thread opened it meanwhile
                    self._check_result()
                    found = self._open_folder()
                    self._snapshot, self._model = Snapshot.of(found), found
        return self._model

    @model.setter
    def model(self, module: nn.Module) -> None:
        if not isinstance(module, nn.Module):
            raise InputError(
                f"model is a {type(module).__name__}; give a module with the pruned model's parameters", name="model"
            )
        if self._snapshot is None:
            self._snapshot = Snapshot.of(self._open_folder())
        self._model = module

    def _open_folder(self) -> nn.Module:
        """The model as the folder holds it."""
        # A folder without a config is a graph's.
        if not (self.proven / "config.json").is_file():
            return open_archive(self.proven / ARCHIVE, read_weights(self.proven)).module().eval()
        trust, dtype = self._origin.trust, find_stored_dtype(self.proven)
        with report_progress(None):
            found = models.load_whole(str(self.proven), dtype=dtype, trust=trust, local=True).model
        if self._kept is not None:  # a temporary folder's name would be in what is written of the model
            forget_folder(found, self.proven)
        return found

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its tokenizer: the dense model's, without the tokens that were removed. It is the same object each time."""
        if self._tokenizer is None:
            with TURN.take():
                if self._tokenizer is None:
                    self._tokenizer = self._open_tokenizer()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise InputError(
                f"tokenizer is a {type(tokenizer).__name__}; give a tokenizer of transformers", name="tokenizer"
            )
        _ = self.tokenizer  # to know the files of the first one
        self._tokenizer = tokenizer

    def _open_tokenizer(self) -> PreTrainedTokenizerBase | None:
        self._check_result()
        if self.compiled is not None:  # a copy: what the caller does to his own tokenizer later does not count
            prepared = self.compiled.prepared
            check_given_tokenizer(prepared.given, self._origin.digests)
            found = copy.deepcopy(prepared.loaded.tokenizer)
        else:
            known = models.has_tokenizer(self.proven)
            found = models.load_tokenizer(str(self.proven), trust=self._origin.trust) if known else None
        self._tokenizer_files = None if found is None else read_saved_files(found)
        return found

    @property
    def changed(self) -> bool:
        """Whether ``model`` has other weights than the folder.

        Raises:
            MptkError: something else was changed in memory or in the folder, which no use of the result could show.
        """
        self._check_result()
        if self._tokenizer is not None:
            check_same("tokenizer", read_saved_files(self._tokenizer), self._tokenizer_files)
        if self._model is None:  # nobody has it, so nobody changed it
            return False
        assert self._snapshot is not None
        differs = self._snapshot.has_changed(self._model)
        self._snapshot.check_rest(self._model)
        return differs

    @property
    def present(self) -> nn.Module:
        """``model`` in the types of its folder: another one with the same weights if it was converted.

        Raises MptkError as ``changed``.
        """
        module, snapshot = self.model, self._snapshot
        assert snapshot is not None
        _ = self.changed  # raises its errors
        if not snapshot.is_converted(module):
            return module
        found = self._open_folder()
        found.load_state_dict(snapshot.read_weights(module))
        return found

    @wrap_public
    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the same folder as ``prune``: checkpoint, plan, report, proof, manifest. Returns it.

        Changed weights of ``model`` are written and proven with all files; the report and the card say so. The quality
        is measured again if the result is from ``prune`` or ``recover`` in this process, and left out if it was opened.
        ``overwrite``: as in ``Settings``.

        Raises:
            MptkError: ``folder`` exists and was not made by mptk, or holds other files; it cannot be written; the plan,
                the report, the tokenizer or a config was changed in memory; or changed weights cannot be proven.
        """
        # Refuse a bad place before changed weights are proven, which takes minutes.
        folder, target = Path(folder), resolve_place(folder)
        check_replaceable(folder, overwrite)
        place = self.place
        if place.resolve() in target.resolve().parents:
            raise OutputError(f"{folder} lies in the folder that is copied; give a place outside of it", name=folder)
        with publish(target, overwrite=overwrite) as new:
            copy_listed(place, new)
        self.folder = self.folder or target
        return folder

    @property
    def place(self) -> Path:
        """The folder that holds the model with its present weights, at least as long as this object lives.

        Changed weights are written and proven first, into a temporary folder.

        Raises:
            MptkError: as ``save``.
        """
        with TURN.take():
            if self.changed:
                self.check_dense()
                self._write_again()
            return self.proven

    def _check_result(self) -> None:
        """Raise MptkError if the folder lost files or holds another result, or the plan or report was changed."""
        # The folder fits its manifest. Of a temporary one the user does not know, so its error has other remedies.
        try:
            if not self.proven.is_dir():
                raise FileError(
                    f"{self.proven} is no longer there; open the folder where it is now, or prune again",
                    name=self.proven,
                )
            check_listed(self.proven)
        except MptkError as error:
            if self._kept is None:
                raise
            raise error.reword(
                f"{error.cause}: the temporary folder of this result was damaged; prune again with out=, or write the "
                "model that is in memory by itself"
            ) from error
        # The manifest is the one that was read first, except for timings, which `mptk bench` adds to a folder.
        now = read_manifest(self.proven)
        if other := sorted(name for name, digest in self._files.items() if now.get(name) != digest and name != LATER):
            raise ChangedError(
                f"{self.proven} holds another result by now ({other[0]} is another file); open it with Pruned.open",
                name=self.proven,
            )
        # Plan and report are attributes that a caller may exchange, delete or write into.
        said = self.__dict__.get("plan"), self.__dict__.get("report")
        check_same("plan", said[0].digest if isinstance(said[0], Plan) else None, read_folder_plan(self.proven).digest)
        check_same("report", format_json(said[1].to_json()) if isinstance(said[1], Report) else None, self._reported)

    def check_dense(self) -> None:
        """Raise MptkError if the dense model that is in memory, or its tokenizer, is not as it was pruned."""
        if self.compiled is not None:
            check_dense(self.report.model, self.compiled.prepared.given, self._origin.digests)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuse to be copied and pickled: the files, and what is known of the dense model, would not come along."""
        raise InputError("a Pruned is not copied or pickled; save(DIR) it, and open that folder with Pruned.open(DIR)")

    def _write_again(self) -> None:
        """Write the present weights into a temporary folder, which takes the place of the folder."""
        assert self._snapshot is not None
        kept, weights = make_scratch(), self._snapshot.read_weights(self.model)
        out = kept.folder / "pruned"
        with report_progress("auto") as say:
            found = write_again(self.proven, out, self.report, weights, self._origin, Context(Log(), say))
        # A graph that was written without its dense module gives only a report.
        if isinstance(found, Report):
            self.report, self.compiled = found, None
        else:
            assert found.report is not None  # one process writes again
            self.report, self.compiled = found.report, found.compiled
            self._origin = replace(self._origin, digests=found.run.origin)
        self._reported = format_json(self.report.to_json())
        # From now on this is the folder. A user's own folder stays as it is until `save`.
        self.proven, self._kept, self._files = out, kept, read_manifest(out)
        self._snapshot = Snapshot.of(self.model)

    def __repr__(self) -> str:
        widths = ", ".join(self.report.list_cut_words())
        return f"Pruned({self.report.model}, sparsity {self.report.sparsity:.3f}: {widths}; folder={self.folder})"

    def _repr_html_(self) -> str:
        place = f"in {self.folder}" if self.folder is not None else "in memory; save(folder) writes it"
        return self.report._repr_html_() + build_line(place)


@wrap_public
def prune(
    model: Model,
    out: str | Path | None = None,
    settings: Settings | None = None,
    *,
    progress: Shown = "auto",
    on_stage: Callable[[PassRecord], None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    example_inputs: GivenInputs | None = None,
    data: Data | None = None,
    eval_data: Data | None = None,
    **keywords: Unpack[PruneKeywords],
) -> Pruned | None:
    """Prune a model and prove the result::

        small = mptk.prune(model, sparsity=0.3, method="wanda", data=texts).model

    Args:
        model: a hub id, folder, ``.gguf`` file or packaged alias; or any ``nn.Module``, which does not change.
        out: folder to write. None: nothing is written, and ONNX graphs are made only with ``onnx=True``.
        settings: the settings; ``keywords`` change some of them.
        progress: ``"auto"``, bars on a terminal and in a notebook; a function (``mptk.progress.Progress``); or None.
        on_stage: called with the record of each stage, passes with their differences.
        tokenizer: for a model in memory; by default the tokenizer of the folder or hub model that it was loaded from.
        example_inputs: tensors for ``forward``, by position or by name, samples in the first dimension. Needed for a
            module that is not a transformers model; its quality is the distance of its outputs from the dense model's.
        data, eval_data: as in ``Settings`` (a file, folder, data set), or in memory: a list of texts; token ids, int64
            [n, length]; inputs by name; ``mptk.Samples``; or batches (a ``DataLoader``, a list) of tensors, tuples or
            dicts of inputs. By default an ``nn.Module`` is calibrated on its example inputs.
        keywords: fields of ``Settings`` (``sparsity``, ``method``, ``families``, …), of its ``Learning`` (``steps``,
            ``rank``, …), ``Training`` (``batch``, ``lr``, …) and ``LossWeights``. What names texts, as ``vocabulary``,
            may be a list of texts.

    Returns:
        The pruned model. If several processes work on one run, only the first gets it; the others get None.

    Raises:
        MptkError: the model cannot be loaded, traced or cut; no legal widths meet the budget (said before any work);
            there is no such keyword; or a stage of the proof exceeds its tolerance. ``out`` then stays as it was.
    """
    given = make_default_settings(settings, out, model, example_inputs)
    start, asked, inputs = take_arguments(model, given, tokenizer, example_inputs, data, eval_data, keywords)
    # Without `out` the run publishes into a temporary folder, which lives as long as the result.
    kept = make_scratch() if out is None else None
    place = kept.folder / "pruned" if kept is not None else resolve_place(str(out))
    with (
        report_progress(progress) as say,
        open_run(start, name_start(model), place, asked, inputs, Context(Log(on_record=on_stage), say)) as run,
    ):
        result = prune_model(start, run)
    return make_pruned(result, place, kept)


def estimate_run(model: str, settings: Settings) -> Estimate:
    """What ``prune(model, …, settings)`` needs, with what its minutes allow. No model runs.

    Raises:
        MptkError: there is no such model; or minutes were given, and the run takes longer.
    """
    estimator = read_estimator(model, settings.trust)
    return estimator.estimate(complete_settings(settings, estimator)[0])


@wrap_public
def recover(
    pruned: Pruned | str | Path,
    out: str | Path | None = None,
    settings: Settings | None = None,
    *,
    model: Model | None = None,
    progress: Shown = "auto",
    on_stage: Callable[[PassRecord], None] | None = None,
    data: Data | None = None,
    eval_data: Data | None = None,
    **keywords: Unpack[RecoverKeywords],
) -> Pruned | None:
    """Train a pruned model against its dense model and prove the result.

    Args:
        pruned: a ``Pruned``, or an ``--out`` folder of ``prune``.
        out, progress, on_stage, data, eval_data: as in ``prune``.
        settings: only fields that do not decide what is cut count: ``learning``, ``length``, ``device``, …
        model: the dense model, if it has moved since the report was written. A ``Pruned`` from ``prune`` knows it.
        keywords: as in ``prune``.

    Raises:
        MptkError: as ``prune``; the folder was changed; or the dense model is missing or was changed.
    """
    # Keywords that would have no effect are refused; fields of `settings` that have none are not.
    settled = {each.path for each in Settings.declared if "recover" not in each.setting.on}
    if refused := sorted(settled & keywords.keys()):
        raise InputError(
            f"recover cannot change {refused[0]}, which was decided when the model was pruned; prune again to change "
            "it",
            name=refused[0],
        )
    base = settings or Settings(onnx=out is not None)
    asked = with_keywords(base, {**name_given(data=data, eval_data=eval_data), **keywords})
    # The folder to begin with has the present weights. The dense model is the given one, the one in memory, or the
    # report's.
    folder = pruned.place if isinstance(pruned, Pruned) else pruned
    dense: str | nn.Module | Opened | None = str(model) if isinstance(model, Path) else model
    if isinstance(pruned, Pruned) and pruned.compiled is not None and model is None:
        pruned.check_dense()
        prepared = pruned.compiled.prepared
        dense = Opened(prepared.given, prepared.task)
    inputs = Inputs.of(data=data, eval_data=eval_data)
    kept = make_scratch() if out is None else None
    place = kept.folder / "pruned" if kept is not None else resolve_place(str(out))
    start = PrunedFolder.read(folder, dense)
    settings = start.take_settings(asked)
    with (
        report_progress(progress) as say,
        open_run(start, start.source, place, settings, inputs, Context(Log(on_record=on_stage), say)) as run,
    ):
        result = prune_model(start, run)
    return make_pruned(result, place, kept)


def estimate_recovery(folder: str | Path, settings: Settings, model: str | None = None) -> Estimate:
    """What a recovery of ``folder`` needs. No model runs. Raises the errors of ``recover``."""
    start = PrunedFolder.read(folder, model)
    settings = start.take_settings(settings)
    estimator = start.read_estimator(settings.trust)
    assert estimator is not None
    return estimator.estimate(complete_settings(settings, estimator, recovers=True)[0])


def take_arguments(
    model: Model,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase | None,
    example_inputs: GivenInputs | None,
    data: Data | None,
    eval_data: Data | None,
    keywords: Mapping[str, object],
) -> tuple[Start, Settings, Inputs]:
    """What a run starts from, its settings, and what the caller holds in memory. The arguments are those of ``prune``.

    Raises:
        MptkError: there is no such keyword; or the arguments do not suit each other.
    """
    # Settings name what is in memory, so that the report says so; `inputs` holds it.
    named, texts = split_texts(keywords)
    asked = with_keywords(settings, {**name_given(data=data, eval_data=eval_data), **named})
    inputs = Inputs.of(tokenizer=tokenizer, example_inputs=example_inputs, data=data, eval_data=eval_data, texts=texts)
    start, asked, inputs = take_model(model, asked, inputs)
    check_start(start, asked, inputs)
    return start, asked, inputs


def check_start(start: Start, asked: Settings, inputs: Inputs) -> None:
    """Raise MptkError if the settings do not suit a model in memory, or data in memory does not suit them."""
    if isinstance(start, Opened) and start.plain:
        if find_method(asked.method).learns and not asked.fixed:
            raise InputError(
                f"{asked.method} trains only transformers models; give method='wanda', 'taylor', 'flap' or "
                "'magnitude', and train Pruned.model yourself",
                name="method",
                nearest=("wanda", "taylor", "flap", "magnitude"),
            )
        if asked.steps or asked.minutes is not None:
            raise InputError(
                "mptk trains only transformers models; leave out steps and minutes, and train Pruned.model yourself",
                name="steps",
            )
    if asked.renumbers_tokens:
        check_texts(data=inputs.data, eval_data=inputs.eval_data)


def make_pruned(result: Result, place: Path, kept: object = None) -> Pruned | None:
    """The result of a run as the caller gets it. ``kept``: as in ``Pruned``. None in all processes but the first."""
    if result.report is None:
        return None
    prepared = result.compiled.prepared
    opened = prepared.dense.given
    origin = FirstRun(opened, sets=result.sets, trust=prepared.given.trust, digests=result.run.origin)
    return Pruned(result.report, place, compiled=result.compiled, kept=kept, origin=origin)


def resolve_place(out: str | Path) -> Path:
    """The place that ``out`` names now, also if the current folder changes during the call.

    Raises MptkError if no file can have this name.
    """
    place = Path(out)
    try:
        place = place.absolute() if place.name else place  # what has no name is refused where it is written
    except FileNotFoundError as error:
        raise OutputError(
            f"the current folder was removed, so {out} is nowhere; give an absolute path", name=out
        ) from error
    # The system says whether a name is possible: a zero byte is a ValueError. A file that is not there is no error.
    try:
        os.lstat(place)
    except ValueError as error:
        raise OutputError(f"{str(out)!r} cannot be a file's name ({error}); give another one", name=out) from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise make_write_error(place, error) from error
    return place


@contextmanager
def report_progress(progress: Shown) -> Iterator[Progress]:
    """Show progress; transformers' own bars are off meanwhile."""
    # transformers draws a bar for each load, which would break into the run's.
    others = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with show_progress() if progress == "auto" else nullcontext(progress or show_nothing) as say:
            yield say
    finally:
        if others:
            enable_progress_bar()


def make_default_settings(
    settings: Settings | None, out: str | Path | None, model: Model, example_inputs: GivenInputs | None
) -> Settings:
    """Default settings of a call: no ONNX without a folder; MaskPrune for transformers models.

    A model in memory with example inputs is calibrated on these, if the settings name no data.
    """
    if settings is None:
        plain = isinstance(model, nn.Module) and not isinstance(unwrap_parallel(model), PreTrainedModel)
        settings = Settings(onnx=out is not None, method="wanda" if plain else Settings.method)
    own = isinstance(model, nn.Module) and example_inputs is not None and settings.data == Settings.data
    return replace(settings, data=IN_MEMORY) if own else settings
