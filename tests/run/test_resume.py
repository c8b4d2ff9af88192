"""A run that trains nothing, stopped and resumed: finished stages are kept, and the result is the same.

It reaches for mptk.protocols.run_folder: what a stopped run left. tests/crash kills runs in truth.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from inside import Stopped
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import mptk
from mptk import Plan, Report, testing
from mptk.config import Learning, Training, to_json
from mptk.errors import ChangedError, FileError, OutputError
from mptk.files import write_json
from mptk.io import hash_model
from mptk.ir import PassRecord
from mptk.protocols import RunFolder, check_unfinished_run, name_run_folder
from mptk.protocols.origin import Origin
from mptk.run.run import list_fixed_values
from mptk.testing import WORDS, expect_error

SHORT = mptk.Settings(method="magnitude", sparsity=0.35, samples=4, length=32, align=8, onnx=False, eval_length=32)
IDS = torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def settings(laboratory):
    return laboratory.make_settings(reconstruct=True, length=32, eval_length=32)


def stop_after(stage: str, ran: list[str] | None = None) -> Callable[[PassRecord], None]:
    """For ``on_stage``: it raises when the stage is done. ``ran``: gets the names of all stages until then."""

    def note(record: PassRecord) -> None:
        if ran is not None:
            ran.append(record.name)
        if record.name == stage:
            raise Stopped

    return note


def prune_until(stage: str, *given: Any, ran: list[str] | None = None, **options: Any) -> None:
    with pytest.raises(Stopped):
        mptk.prune(*given, on_stage=stop_after(stage, ran), **options)


def digests(folder: Path, *, plan: bool = True) -> dict[str, str]:
    names = [path.name for path in folder.iterdir() if path.suffix == ".safetensors"] + ["plan.json"] * plan
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def list_kept_blocks(out: Path) -> dict[str, int]:
    """The blocks that an unfinished run has distilled, and when each was written."""
    return {file.name: file.stat().st_mtime_ns for file in name_run_folder(out).glob("block-*.safetensors")}


def test_a_stopped_run_keeps_each_finished_stage(laboratory, settings, tmp_path):
    """A block is distilled once, too, and what is resumed gives the bits of an unbroken run, in the model's type."""
    settings = replace(settings, distil_epochs=1, dtype="bfloat16", resume=True)
    model, unbroken, out, ran = str(laboratory.open_model()), tmp_path / "unbroken", tmp_path / "out", list[str]()
    prune_until("analyse", model, out, settings)
    assert list(tmp_path.iterdir()) == [], "nothing was finished"
    whole = mptk.prune(model, unbroken, settings)
    prune_until("choose widths", model, out, settings, ran=ran)
    assert not out.exists()

    def stop_in_third_block(stage: str, done: int, *_: object) -> None:
        if stage == "distil" and len(list_kept_blocks(out)) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        mptk.prune(model, out, settings, progress=stop_in_third_block, on_stage=lambda record: ran.append(record.name))
    two = list_kept_blocks(out)
    assert len(two) == 2
    prune_until("write stock", model, out, settings, ran=ran)
    assert len(list_kept_blocks(out)) > 2, "the rest of them"
    assert list_kept_blocks(out).items() >= two.items()
    resumed = mptk.prune(model, out, settings, on_stage=lambda record: ran.append(record.name))
    assert (ran.count("score (wanda)"), ran.count("choose widths")) == (1, 2), (
        "the first was stopped before it was kept"
    )

    assert digests(out) == digests(unbroken)
    # Measured with the weights in memory, which outlive the run's folder.
    assert mptk.evaluate(resumed, IDS[:2], progress=None) == mptk.evaluate(whole, IDS[:2], progress=None)
    expected, report = Report.read(unbroken), Report.read(out)
    assert (report.notes, report.splits, report.quality) == (expected.notes, expected.splits, expected.quality)
    assert {"model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.o_proj.weight"} <= set(report.trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "unbroken"]
    assert all(d.ok for d in mptk.verify(out))


def test_flaps_biases_are_kept_and_proven(gpt2, settings, tmp_path):
    """GPT-2's heads have no stock config, so only the feed-forward channels go; its biases take up the means."""
    out, ran = tmp_path / "out", list[str]()
    flap = replace(settings, method="flap", families=("ffn",), widths={"ffn": 48}, reconstruct=None, onnx=True)
    flap = replace(flap, dtype="bfloat16", resume=True)
    prune_until("write stock", gpt2, out, flap)
    kept = load_file(name_run_folder(out) / "choice.safetensors")
    report = mptk.prune(gpt2, out, flap, on_stage=lambda record: ran.append(record.name)).report
    assert "score (flap)" not in ran
    written = load_file(out / "compensation.safetensors")
    assert {name: tensor.tolist() for name, tensor in written.items()} == {n: t.tolist() for n, t in kept.items()}
    assert (report.families["ffn"]["width"], report.families["heads"]["width"]) == (48, 6)
    assert all(d.ok for d in mptk.verify(out))


# ---- which run goes on ----


def test_a_run_that_has_nothing_to_resume_says_so(laboratory, settings, tmp_path):
    model, out, said = str(laboratory.open_model()), tmp_path / "out", list[str]()

    def stop(stage: str, *_: object) -> None:
        said.append(stage)
        if stage == "choose widths":
            raise Stopped

    for resumes, says in ((False, False), (True, False)):
        with pytest.raises(Stopped):
            mptk.prune(model, out, replace(settings, resume=resumes), progress=stop)
        assert any(str(out) in stage for stage in said) is says
    with pytest.raises(Stopped):
        mptk.prune(model, tmp_path / "other", replace(settings, resume=True), progress=stop)
    assert any(str(tmp_path / "other") in stage for stage in said)


def test_other_settings_are_refused_with_resume_and_start_anew_without(tmp_path):
    out = tmp_path / "out"
    asked = replace(SHORT, learning=Learning(steps=0))
    first, device, method = (
        list_fixed_values("model", each)
        for each in (asked, replace(asked, device="cpu"), replace(asked, method="wanda"))
    )
    RunFolder(out, first, resume=False).save("text", {"ids": torch.ones(2)})
    with expect_error(OutputError, name=name_run_folder(out)):
        check_unfinished_run(out, method, resume=True)
    assert RunFolder(out, device, resume=True).keeps("text")
    assert not RunFolder(out, method, resume=False).keeps("text")
    assert list(tmp_path.iterdir()) == []


def test_without_resume_a_run_that_trains_is_refused_and_another_is_replaced(tmp_path):
    one_shot, training = (to_json(mptk.Settings(learning=Learning(steps=steps))) for steps in (0, 3))
    RunFolder(tmp_path / "out", one_shot, resume=False).save("text", {"ids": torch.ones(2)})
    work = RunFolder(tmp_path / "out", training, resume=False)
    assert not work.keeps("text")
    work.save("text", {"ids": torch.ones(3)})
    with expect_error(OutputError, name=name_run_folder(tmp_path / "out")):
        RunFolder(tmp_path / "out", one_shot, resume=False)


def test_a_checkpoint_with_what_is_no_number_is_damaged(tmp_path):
    folder = RunFolder(tmp_path / "out", {}, resume=False)
    folder.save_checkpoint(
        "masks", 2, {"watched": torch.tensor([[0.0, torch.inf]]), "rng": torch.zeros(3, dtype=torch.uint8)}
    )
    folder.save_checkpoint("masks", 4, {"watched": torch.tensor([[torch.nan, 1.0]])})
    file = folder.path / "masks-00000004.safetensors"
    for read in (lambda: folder.read_latest("masks"), lambda: folder.read_checkpoint("masks", 4)):
        with expect_error(FileError, name=file):
            read()
    file.unlink()
    assert folder.read_latest("masks")


# ---- what the run was given ----


def test_an_error_names_the_first_changed_files_and_counts_the_others():
    before = Origin(parts={f"text/{n}.md": "a" for n in range(40)})
    before.require(before)
    with expect_error(ChangedError, name=", ".join([*sorted(before.parts)[:8], "32 more"])):
        before.require(Origin(parts=dict.fromkeys(before.parts, "b")))
    with expect_error(ChangedError, name="text/7.md"):
        before.require(Origin(parts={**before.parts, "text/7.md": "b"}))


def replace_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def shift_weights(model: Path) -> None:
    state = load_file(model / "model.safetensors")
    save_file({name: tensor + 0.5 for name, tensor in state.items()}, model / "model.safetensors", {"format": "pt"})


CHANGES = {
    "the model's model.safetensors": shift_weights,
    "the model's config.json": replace_text("config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'),
    "the model's tokenizer.json": replace_text("tokenizer.json", f'"{WORDS[0]}"', '"other"'),
    "text.txt": lambda model: (model.parent / "text.txt").write_text(" ".join(reversed(WORDS * 90))),
    "plan.json": replace_text("../plan.json", '"0-31"', '"1-32"'),
}
"""What a run is given, as it is named, and a change of it."""


@pytest.fixture
def place(laboratory, tmp_path):
    """A model of its own, with a text and a plan beside it."""
    shutil.copytree(laboratory.open_model(), tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 90))
    keep = {f"model.layers.{i}.mlp": "0-31" for i in range(3)}
    families = {"ffn": {"width": 32, "of": 80, "keep": keep}}
    write_json(tmp_path / "plan.json", {"format": "mptk-plan/1", "meta": {}, "families": families})
    return tmp_path


def require_refused_after(changes: dict[str, Any], place: Path, settings: mptk.Settings) -> None:
    """The changes refuse to go on with the run in ``place``, each by its name. The run stays. Then all is put back."""
    before = digests(place / "out.run", plan=False)
    shutil.copytree(place / "model", place / "saved")
    files = {name: (place / name).read_bytes() for name in ("text.txt", "plan.json")}
    for change in changes.values():
        change(place / "model")
    with expect_error(ChangedError) as refused:
        mptk.prune(str(place / "model"), place / "out", replace(settings, resume=True))
    assert all(name in refused.value.name for name in changes)
    assert not (place / "out").exists()
    assert digests(place / "out.run", plan=False) == before
    shutil.copytree(place / "saved", place / "model", dirs_exist_ok=True)
    for file, content in files.items():
        (place / file).write_bytes(content)


def test_an_unfinished_run_is_not_gone_on_with_after_what_it_was_given_changed(place):
    """If all is put back it goes on, and the report has the fingerprint of the model."""
    settings = replace(SHORT, data=str(place / "text.txt"))
    model, out = str(place / "model"), place / "out"
    prune_until("choose widths", model, out, settings)
    require_refused_after({name: CHANGES[name] for name in CHANGES if name != "plan.json"}, place, settings)
    mptk.prune(model, out, replace(settings, resume=True))
    assert Report.read(out).model_sha256 == hash_model(model)


def test_another_sparsity_is_refused_before_the_model_is_opened(place):
    """The model is gone, and nobody looks for it."""
    settings = replace(SHORT, data=str(place / "text.txt"))
    prune_until("choose widths", str(place / "model"), place / "out", settings)
    (place / "model" / "model.safetensors").unlink()
    with expect_error(OutputError) as refused:
        mptk.prune(str(place / "model"), place / "out", replace(settings, sparsity=0.4, resume=True))
    assert Path(refused.value.name) == place / "out.run"


def test_a_run_of_a_plan_is_not_gone_on_with_after_the_plan_changed(place):
    learning = Learning(steps=2, rank=2, training=Training(batch=2, micro=2))
    settings = replace(SHORT, data=str(place / "text.txt"), plan=str(place / "plan.json"), learning=learning)
    prune_until("rewrite", str(place / "model"), place / "out", settings)
    require_refused_after({"plan.json": CHANGES["plan.json"]}, place, settings)


def test_a_plan_that_is_edited_meanwhile_changes_nothing(place):
    plan = Plan.load(place / "plan.json")
    settings = replace(SHORT, data=str(place / "text.txt"), plan=str(place / "plan.json"))
    found = mptk.prune(
        str(place / "model"), settings=settings, progress=None, on_stage=lambda _: Plan({}).save(place / "plan.json")
    )
    assert found.plan == plan
    assert Plan.load(place / "plan.json") == Plan({})


def test_nothing_is_published_after_what_a_run_was_given_changed(place):
    changed = {name for name in CHANGES if name not in ("plan.json", "the model's config.json")}

    def change(record: PassRecord) -> None:
        if record.name == "write stock":  # all numbers were read
            for name in changed:
                CHANGES[name](place / "model")

    settings = replace(SHORT, data=str(place / "text.txt"))
    with expect_error(ChangedError) as refused:
        mptk.prune(str(place / "model"), place / "out", settings, on_stage=change)
    assert {name.replace(f"{place}/", "") for name in refused.value.name.split(", ")} == changed
    assert not (place / "out").exists()


def test_a_model_in_memory_that_is_trained_meanwhile(tmp_path):
    model = testing.make_llama(layers=1)

    def train(record: PassRecord) -> None:
        if record.name == "write stock":
            with torch.no_grad():
                model.model.norm.weight[0] += 1

    with expect_error(ChangedError, name="the model's weights"):
        mptk.prune(model, tmp_path / "out", SHORT, data=IDS, on_stage=train)
    assert not (tmp_path / "out").exists()


def test_texts_and_a_tokenizer_in_memory_are_what_the_unfinished_run_was_started_with(laboratory, tmp_path):
    model, out = str(laboratory.open_model()), tmp_path / "out"
    texts, tokenizer = [" ".join(WORDS * 20)], AutoTokenizer.from_pretrained(model)
    prune_until("choose widths", model, out, SHORT, data=texts, tokenizer=tokenizer)
    another = AutoTokenizer.from_pretrained(model)
    another.add_special_tokens({"pad_token": WORDS[0]})
    for given, name in (
        ({"data": [" ".join(reversed(WORDS * 20))], "tokenizer": tokenizer}, "data"),
        ({"data": texts, "tokenizer": another}, "the tokenizer"),
    ):
        with expect_error(ChangedError) as refused:
            mptk.prune(model, out, SHORT, resume=True, **given)
        assert name in refused.value.name
    tokenizer("a", truncation=True, max_length=1)  # which it remembers
    assert mptk.prune(model, out, SHORT, data=texts, tokenizer=tokenizer, resume=True)


def test_a_copy_of_the_laboratory_changes_no_file_that_a_run_may_be_reading(laboratory, tmp_path):
    files = sorted(laboratory.open_model().iterdir())
    before = [file.stat().st_ctime_ns for file in files]  # a hard link would renew it
    laboratory.copy(files[0].parent, tmp_path / "copy")
    assert [file.stat().st_ctime_ns for file in files] == before
