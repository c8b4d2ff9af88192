"""A run that trains nothing, stopped and resumed: finished stages are kept, and the result is the same.

It reaches for mptk.protocols.run_folder: what a stopped run left.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from inside import Stopped, changed
from lab import remembered
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_pruning import gpt2  # noqa: F401 (a fixture)
from toy_checkpoints import llama_config
from transformers import AutoTokenizer, LlamaForCausalLM

import mptk
from mptk import MptkError, Plan, Report, testing
from mptk.config import to_json
from mptk.config.learning import Learning, Training
from mptk.files import write_json
from mptk.io.dense import hash_model
from mptk.ir.passes import PassRecord
from mptk.protocols.run_folder import RunFolder
from mptk.testing import WORDS, save_word_model

SETTINGS = mptk.Settings(
    method="wanda", reconstruct=True, sparsity=0.35, samples=4, length=32, align=8, onnx=False, eval_length=32
)
TEXT, SCORE, WIDTHS = (
    "mptk.tasks.inputs.text.TextWindows.draw_calibration",
    "mptk.methods.criteria.measure_and_score",
    "mptk.methods.one_shot.find_best_plan",
)
FIT, CUT, WRITE = (
    "mptk.run.recover.reconstruct_consumers",
    "mptk.compile.cut.cut_program",
    "mptk.targets.stock.write_checkpoint",
)
SAVE = "mptk.protocols.run_folder.write_weights"
BLOCK = "mptk.methods.distil._Block.train"
REFUSED = [
    (SAVE, errno.ENOSPC),
    ("mptk.files.replace.os.replace", errno.EROFS),
    ("mptk.files.staging.os.mkdir", errno.EACCES),
    (WRITE, errno.ENOSPC),
    ("mptk.files.replace._swap_names", errno.EROFS),
]
"""What writes, in the order of the stages, and why it may not."""
SAID = {
    errno.ENOSPC: "the disk is full|No space left",
    errno.EROFS: "[Rr]ead-only",
    errno.EDQUOT: "[Dd]isk quota",
    errno.EACCES: "Permission denied",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_word_model(LlamaForCausalLM(llama_config()), tmp_path_factory.mktemp("llama") / "dense")


@pytest.fixture(scope="module", autouse=True)
def prepared_once() -> Iterator[None]:
    with remembered():
        yield


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> mptk.Settings:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(" ".join(random.Random(0).choices(WORDS, k=900)))
    return replace(SETTINGS, data=str(text))


@contextmanager
def counted(counts: Counter[str], stop: str | None, call: int = 1) -> Iterator[None]:
    """Count the calls of the stages that end. The nth call of ``stop`` half writes its file, if it has one, and stops."""

    def ended(name: str) -> Callable[[object], object]:
        def count(result: object) -> object:
            counts[name] += 1
            return result

        return count

    with changed() as inside:
        if stop is not None:
            inside.stop(stop, call)
        for name in (TEXT, SCORE, WIDTHS, FIT, BLOCK, CUT, WRITE, SAVE):
            inside.spoil(name, ended(name))
        yield


def stopped(model: str, out: Path, settings: mptk.Settings, counts: Counter[str], stop: str, call: int = 1) -> None:
    with counted(counts, stop, call), pytest.raises(Stopped):
        mptk.prune(model, out, settings)


def digests(folder: Path, *, plan: bool = True) -> dict[str, str]:
    names = [path.name for path in folder.iterdir() if path.suffix == ".safetensors"] + ["plan.json"] * plan
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def require_resumed(model: str, settings: mptk.Settings, tmp_path: Path, stops: list[tuple[str, int]]) -> Counter[str]:
    """A run stopped at each of ``stops`` gives what an unbroken one gives; returns how often each stage ended."""
    unbroken, out, counts = tmp_path / "unbroken", tmp_path / "out", Counter[str]()
    whole = mptk.prune(model, unbroken, settings)
    for stop, call in stops:
        stopped(model, out, replace(settings, resume=True), counts, stop, call)
        assert not out.exists()
    with counted(counts, None):
        resumed = mptk.prune(model, out, replace(settings, resume=True))
    assert digests(out) == digests(unbroken)
    ids = torch.randint(3, 97, (2, 32))  # measured with the weights in memory, which outlive the run's folder
    assert whole is not None
    assert resumed is not None
    assert mptk.evaluate(resumed, ids, progress=None) == mptk.evaluate(whole, ids, progress=None)
    expected, report = Report.read(unbroken), Report.read(out)
    assert (report.notes, report.splits, report.quality) == (expected.notes, expected.splits, expected.quality)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "unbroken"]
    return counts


def test_a_stopped_run_keeps_each_finished_stage(llama: str, settings: mptk.Settings, tmp_path: Path) -> None:
    stops = [SCORE, WIDTHS, FIT, CUT, WRITE]
    counts = require_resumed(llama, settings, tmp_path, [(stop, 1) for stop in stops])
    assert [counts[name] for name in (TEXT, SCORE, WIDTHS, FIT)] == [2, 1, 1, 1]  # one sample, to fail early; then all


def test_a_stage_stopped_while_its_weights_are_written_runs_again(
    llama: str,
    settings: mptk.Settings,
    tmp_path: Path,
) -> None:
    counts = require_resumed(llama, settings, tmp_path, [(FIT, 1), (SAVE, 1)])
    assert [counts[name] for name in (SCORE, WIDTHS, FIT)] == [1, 1, 2]


def test_a_block_is_distilled_once_and_stored_in_the_models_type(
    llama: str, settings: mptk.Settings, tmp_path: Path
) -> None:
    distilling = replace(settings, reconstruct=None, distil_epochs=1, dtype="bfloat16")
    counts = require_resumed(llama, distilling, tmp_path, [(BLOCK, 3), (CUT, 1)])
    report = Report.read(tmp_path / "out")
    assert (counts[FIT], counts[BLOCK]) == (1, 3)
    assert {"model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.o_proj.weight"} <= set(report.trained)
    assert [note for note in report.notes if note.startswith("local distillation made")]
    assert all(d.ok for d in mptk.verify(tmp_path / "out"))


def test_flaps_biases_and_note_are_kept(gpt2: str, settings: mptk.Settings, tmp_path: Path) -> None:  # noqa: F811
    flap = replace(settings, method="flap", families=("ffn",), widths={"ffn": 48}, reconstruct=None)
    counts = require_resumed(gpt2, flap, tmp_path, [(CUT, 1)])
    assert counts[SCORE] == 1
    assert "compensation.safetensors" in digests(tmp_path / "out")


def test_other_settings_are_refused_with_resume_and_start_anew_without(
    llama: str,
    settings: mptk.Settings,
    tmp_path: Path,
) -> None:
    out, counts = tmp_path / "out", Counter[str]()
    stopped(llama, out, settings, counts, SCORE)
    other = replace(settings, method="magnitude", reconstruct=None)
    with pytest.raises(MptkError, match=r"other settings \(method, reconstruct\); give the same"):
        mptk.prune(llama, out, replace(other, resume=True))
    stopped(llama, out, other, counts, SCORE)
    with counted(counts, None):
        mptk.prune(llama, out, replace(other, resume=True, device="cpu"))
    assert counts[TEXT] == 4  # two runs, each of which looks at one window before its work
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_resume_a_run_that_trains_is_refused_and_another_is_replaced(tmp_path: Path) -> None:
    one_shot, training = (to_json(mptk.Settings(learning=Learning(steps=steps))) for steps in (0, 3))
    RunFolder(tmp_path / "out", one_shot, resume=False).save("text", {"ids": torch.ones(2)})
    work = RunFolder(tmp_path / "out", training, resume=False)
    assert not work.keeps("text")
    work.save("text", {"ids": torch.ones(3)})
    with pytest.raises(MptkError, match="unfinished run; add --resume"):
        RunFolder(tmp_path / "out", one_shot, resume=False)


def test_what_the_system_refuses_is_one_line_and_the_run_goes_on_afterwards(
    llama: str, settings: mptk.Settings, tmp_path: Path
) -> None:
    """At each stage that writes, with each reason; the earlier output and the model stay as they are."""
    out, resumed = tmp_path / "out", replace(settings, resume=True)
    mptk.prune(llama, out, replace(settings, sparsity=0.2))
    earlier, model = digests(out), digests(Path(llama), plan=False)
    for stage, number in REFUSED:
        with changed() as inside:
            inside.around(stage, refusing(number))
            with pytest.raises(MptkError) as raised:
                mptk.prune(llama, out, resumed)
        assert re.search(SAID[number], str(raised.value))
        assert "; " in str(raised.value)
        assert "\n" not in str(raised.value)
        assert digests(out) == earlier
        assert digests(Path(llama), plan=False) == model
        assert {path.name for path in tmp_path.iterdir()} <= {"out", "out.run"}
    counts = Counter[str]()
    with counted(counts, None):
        mptk.prune(llama, out, resumed)
    assert (counts[TEXT], counts[SCORE], counts[FIT], digests(out) == earlier) == (0, 0, 0, False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refusing(number: int) -> Callable[..., object]:
    """What the system says to a library in C, or one in Rust, that writes."""
    said = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    error = SafetensorError(said) if number in (errno.ENOSPC, errno.EROFS) else OSError(number, os.strerror(number))

    def refuse(*_: object, **__: object) -> None:
        raise error

    return refuse


def test_a_run_stopped_before_anything_is_finished_leaves_no_folder(
    llama: str, settings: mptk.Settings, tmp_path: Path
) -> None:
    stopped(llama, tmp_path / "out", settings, Counter(), TEXT)
    assert list(tmp_path.iterdir()) == []


# ---- what the run was given ----


def reweighted(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    save_file({name: tensor + 0.5 for name, tensor in state.items()}, model / "model.safetensors", {"format": "pt"})


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


CHANGES = {
    "the model's model.safetensors": reweighted,
    "the model's config.json": replaced("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
    "the model's tokenizer.json": replaced("tokenizer.json", f'"{WORDS[0]}"', '"other"'),
    "text.txt": lambda model: (model.parent / "text.txt").write_text(" ".join(reversed(WORDS * 90))),
    "plan.json": replaced("../plan.json", '"0-31"', '"1-32"'),
}
"""What a run is given, as it is named, and a change of it."""


@pytest.fixture
def place(llama: str, tmp_path: Path) -> Path:
    """A model of its own, with a text and a plan beside it."""
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 90))
    keep = {f"model.layers.{i}.mlp": "0-31" for i in range(3)}
    families = {"ffn": {"width": 32, "of": 80, "keep": keep}}
    write_json(tmp_path / "plan.json", {"format": "mptk-plan/1", "meta": {}, "families": families})
    return tmp_path


@pytest.mark.parametrize("what", CHANGES)
def test_an_unfinished_run_is_not_gone_on_with_after_what_it_was_given_changed(what: str, place: Path) -> None:
    settings = replace(SETTINGS, data=str(place / "text.txt"))
    out, stop = place / "out", WIDTHS
    if what == "plan.json":
        learning = Learning(steps=2, rank=2, training=Training(batch=2, micro=2))
        settings, stop = replace(settings, plan=str(place / "plan.json"), learning=learning, reconstruct=False), CUT
    stopped(str(place / "model"), out, settings, Counter(), stop)
    before = digests(place / "out.run", plan=False)
    CHANGES[what](place / "model")
    message = (
        rf"{what}.* changed since .*out\.run was started, so the result would mix old and new; restore what it was"
    )
    with pytest.raises(MptkError, match=message):
        mptk.prune(str(place / "model"), out, replace(settings, resume=True))
    assert not out.exists()
    assert digests(place / "out.run", plan=False) == before


def test_a_plan_that_is_edited_meanwhile_changes_nothing(place: Path) -> None:
    plan = Plan.load(place / "plan.json")
    settings = replace(SETTINGS, data=str(place / "text.txt"), plan=str(place / "plan.json"))
    found = mptk.prune(
        str(place / "model"), settings=settings, progress=None, on_stage=lambda _: Plan({}).save(place / "plan.json")
    )
    assert found.plan == plan
    assert Plan.load(place / "plan.json") == Plan({})


@pytest.mark.parametrize("what", ["the model's model.safetensors", "the model's tokenizer.json", "text.txt"])
def test_nothing_is_published_after_what_a_run_was_given_changed(what: str, place: Path) -> None:
    def change(record: PassRecord) -> None:
        if record.name == "write stock":  # all numbers were read
            CHANGES[what](place / "model")

    settings = replace(SETTINGS, data=str(place / "text.txt"))
    message = rf"^.*{what} changed during the run, so nothing was published; start again$"
    with pytest.raises(MptkError, match=message):
        mptk.prune(str(place / "model"), place / "out", settings, on_stage=change)
    assert not (place / "out").exists()


def test_the_report_has_the_fingerprint_of_the_start(place: Path) -> None:
    """A file that was only touched is the same."""
    settings = replace(SETTINGS, data=str(place / "text.txt"))
    before = hash_model(str(place / "model"))
    touch = lambda record: (place / "model" / "model.safetensors").touch()  # noqa: E731
    mptk.prune(str(place / "model"), place / "out", settings, on_stage=touch)
    assert Report.read(place / "out").model_sha256 == before


def test_a_model_in_memory_that_is_trained_meanwhile(tmp_path: Path) -> None:
    model = testing.make_llama()

    def train(record: PassRecord) -> None:
        if record.name == "write stock":
            with torch.no_grad():
                model.model.norm.weight[0] += 1

    with pytest.raises(MptkError, match=r"^the model's weights changed during the run"):
        mptk.prune(model, tmp_path / "out", SETTINGS, data=torch.randint(3, 300, (4, 32)), on_stage=train)
    assert list(tmp_path.iterdir()) in ([], [tmp_path / "out.run"])


def test_data_in_memory_is_what_the_unfinished_run_was_started_with(llama: str, tmp_path: Path) -> None:
    first, second = (torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    with counted(Counter(), WIDTHS), pytest.raises(Stopped):
        mptk.prune(llama, tmp_path / "out", SETTINGS, data=first)
    with pytest.raises(
        MptkError, match=r"data in memory differs from the data that .*out\.run was started with; give the same"
    ):
        mptk.prune(llama, tmp_path / "out", SETTINGS, data=second, resume=True)
    assert mptk.prune(llama, tmp_path / "out", SETTINGS, data=first, resume=True)


def test_a_tokenizer_in_memory_is_what_the_unfinished_run_was_started_with(place: Path) -> None:
    model, data = str(place / "model"), str(place / "text.txt")
    first, other, same = (AutoTokenizer.from_pretrained(model) for _ in range(3))
    with counted(Counter(), WIDTHS), pytest.raises(Stopped):
        mptk.prune(model, place / "out", SETTINGS, data=data, tokenizer=first)
    other.add_special_tokens({"pad_token": WORDS[0]})
    with pytest.raises(MptkError, match=r"^the tokenizer changed since .*out\.run was started"):
        mptk.prune(model, place / "out", SETTINGS, data=data, tokenizer=other, resume=True)
    same("a", truncation=True, max_length=1)  # which it remembers
    assert mptk.prune(model, place / "out", SETTINGS, data=data, tokenizer=same, resume=True)


def test_a_checkpoint_with_what_is_no_number_is_damaged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", {}, resume=False)
    folder.save_checkpoint(
        "masks", 2, {"watched": torch.tensor([[0.0, torch.inf]]), "rng": torch.zeros(3, dtype=torch.uint8)}
    )
    folder.save_checkpoint("masks", 4, {"watched": torch.tensor([[torch.nan, 1.0]])})
    file = folder.path / "masks-00000004.safetensors"
    for read in (lambda: folder.read_latest("masks"), lambda: folder.read_checkpoint("masks", 4)):
        with pytest.raises(MptkError, match=rf"^{file} is damaged: watched is not a number; remove {file}, and start"):
            read()
    file.unlink()
    assert folder.read_latest("masks")
