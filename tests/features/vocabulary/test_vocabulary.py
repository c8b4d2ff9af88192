"""``prune --vocabulary``: a folder without the tokens that a text never uses, whose logits are the dense model's own.

It reaches for mptk.features.vocabulary.convert: a written tokenizer is damaged.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as t
from lab import fields, raw_report
from small_modules import Small

import mptk
from mptk import Plan, testing
from mptk.errors import DataError, FileError, InputError, PlanError, ProofError
from mptk.features.vocabulary.convert import Tokens
from mptk.publish.manifest import write_manifest
from mptk.report.card import CARD
from mptk.targets.stock import check_same_reading
from mptk.testing import expect_error
from mptk.testing.kinds import CLASSES, ENCODER, TOKEN_COUNT

WORDS = "the quick brown fox jumps "
TEXT = WORDS * 90
OTHER = testing.SENTENCES * 20
FEW = {"samples": 4, "length": 24, "eval_windows": 2, "eval_length": 24, "align": 2, "method": "magnitude"}
ALONE = {**FEW, "sparsity": 0.0, "onnx": False, "progress": None, "data": [TEXT], "vocabulary": [TEXT]}


def spread(model: t.PreTrainedModel) -> t.PreTrainedModel:
    """Weights of a size that shows a wrong row in the logits."""
    torch.manual_seed(0)
    return testing.draw_weights(model)


def write_dense(root: Path) -> None:
    model = spread(testing.make_llama(layers=1, tied=False))
    testing.save_model(model, root / "dense", testing.make_tokenizer(begin=True))
    (root / "few.txt").write_text(TEXT)
    (root / "many.txt").write_text(OTHER)


@pytest.fixture(scope="module")
def dense(laboratory):
    """A decoder whose head is not its embedding, and the texts."""
    return laboratory.keep("vocabulary/dense", write_dense) / "dense"


def prune_dense(dense: Path, out: Path) -> None:
    asked = {**FEW, "sparsity": 0.3, "data": str(dense.parent / "many.txt")}
    mptk.prune(str(dense), out, vocabulary=str(dense.parent / "few.txt"), **asked)


@pytest.fixture(scope="module")
def pruned(dense, laboratory):
    """The decoder with the tokens of a text, and 30 % of its blocks removed, with ONNX."""
    return laboratory.keep("vocabulary/pruned", lambda out: prune_dense(dense, out))


def logits(model: t.PreTrainedModel, ids: list[int], **more: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **more).logits[0]


def tokens_of(plan: Plan) -> tuple[int, ...]:
    return Tokens.read(plan.conversions["vocabulary"]).keep


@pytest.mark.always
def test_the_folder_is_a_stock_model_with_fewer_tokens(dense, pruned):
    report, plan = mptk.Pruned.open(pruned).report, Plan.load(pruned / "plan.json")
    kept = tokens_of(plan)
    assert report.rows["vocabulary"]["of"] == 300
    assert report.rows["vocabulary"]["kept"] == len(kept) < 290
    assert len(kept) % 2 == 0
    small, words = t.AutoModelForCausalLM.from_pretrained(pruned), t.AutoTokenizer.from_pretrained(pruned)
    assert small.get_input_embeddings().weight.shape[0] == small.lm_head.weight.shape[0] == len(kept) == len(words)
    for name, model in (("dense", testing.make_llama(layers=1, tied=False)), ("pruned", small)):
        assert report.cost[name]["parameters"] == sum(p.numel() for p in model.parameters())
    whole = t.AutoTokenizer.from_pretrained(dense)
    assert [kept[i] for i in words(WORDS).input_ids] == whole(WORDS).input_ids
    assert words.decode(words("lazy honey, é").input_ids, skip_special_tokens=True) == "lazy honey, é"
    assert (small.config.eos_token_id, words.eos_token_id) == (1, 1)
    card = (pruned / CARD).read_text()
    assert f"{len(kept)} of 300 tokens stay" in card
    assert f"| vocabulary |  | 300 → {len(kept)} |" in card


def test_the_proof_compares_with_the_model_that_has_all_tokens(pruned):
    stages = [d.stage for d in mptk.verify(pruned)]
    assert stages == [d["stage"] for d in mptk.Pruned.open(pruned).report.proof]
    assert stages[2:4] == ["vocabulary", "rewritten graph"]
    assert stages[-1].startswith("ONNX Runtime")


def test_logits_of_the_tokens_that_stay_are_the_dense_ones(dense):
    result = mptk.prune(str(dense), **ALONE)
    kept, small = tokens_of(result.plan), result.model
    whole, words = t.AutoModelForCausalLM.from_pretrained(dense), t.AutoTokenizer.from_pretrained(dense)
    ids = result.tokenizer(WORDS).input_ids
    there = logits(whole, words(WORDS).input_ids)[:, list(kept)]
    assert torch.equal(logits(small, ids), there)
    assert result.report.sparsity == 0
    assert result.plan.families == {}
    assert result.report.quality["dense"] == result.report.quality["pruned"]
    assert not result.report.settings.steps


def test_special_tokens_of_the_config_move_with_their_rows(dense, tmp_path):
    model = spread(testing.make_llama(layers=1, tied=True))
    model.config.eos_token_id = model.generation_config.eos_token_id = [1, 299]
    model.generation_config.suppress_tokens = [3, 298]
    words = testing.make_tokenizer()
    result = mptk.prune(model, tokenizer=words, **ALONE)
    keep = tokens_of(result.plan)
    assert keep[-1] == 299
    assert 298 not in keep
    result.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert config["eos_token_id"] == [1, len(keep) - 1]
    assert config["suppress_tokens"] == [keep.index(3)] if 3 in keep else []
    assert result.report.rows["vocabulary"]["config_changes"]["vocab_size"] == [300, len(keep)]
    proof = mptk.verify(tmp_path / "saved", model=model)
    assert [d.stage for d in proof].count("vocabulary") == 1
    assert "the tokenizer was not compared" in proof.notes[0]


def test_a_trimmed_folder_is_trained_and_cut_again(dense, pruned, tmp_path):
    training = {"steps": 1, "batch": 2, "micro": 2, "length": 24, "eval_windows": 2, "eval_length": 24}
    trained = mptk.recover(pruned, progress=None, data=str(dense.parent / "many.txt"), **training)
    assert trained.plan.conversions == Plan.load(pruned / "plan.json").conversions
    assert trained.report.rows["vocabulary"]["corpus"] == "the plan"
    again = mptk.prune(str(dense), **{**FEW, "plan": str(pruned / "plan.json"), "data": [TEXT]}, progress=None)
    assert again.report.plan_sha256 == mptk.Pruned.open(pruned).report.plan_sha256
    twice = mptk.prune(str(pruned), progress=None, **{**FEW, "data": [TEXT], "sparsity": 0.2, "tolerance": 0.3})
    assert len(twice.tokenizer) == len(again.tokenizer)


def test_encoder_decoders_and_masked_models_lose_rows_too_and_classifiers_keep_their_outputs(laboratory):
    folder = laboratory.open_model("encoder-decoder")
    whole, result = t.AutoModelForSeq2SeqLM.from_pretrained(folder), mptk.prune(str(folder), **ALONE)
    kept = list(tokens_of(result.plan))
    assert len(kept) < whole.config.vocab_size
    ids, start = result.tokenizer(WORDS).input_ids, torch.tensor([[0, 5, 7]])
    there = logits(whole, [kept[i] for i in ids], decoder_input_ids=torch.tensor(kept)[start])
    assert torch.allclose(logits(result.model, ids, decoder_input_ids=start), there[:, kept], atol=1e-6)
    masked = spread(t.BertForMaskedLM(t.BertConfig(**ENCODER))).eval()
    words = testing.make_tokenizer()
    words.add_special_tokens({"mask_token": "<pad>"})
    result = mptk.prune(masked, tokenizer=words, **ALONE)
    kept = list(tokens_of(result.plan))
    ids = result.tokenizer(WORDS).input_ids
    there = logits(masked, [kept[i] for i in ids])[:, kept]
    assert torch.allclose(logits(result.model, ids), there, atol=1e-5)
    result = mptk.prune(str(laboratory.open_model("text classifier")), **ALONE)
    assert result.model.get_input_embeddings().weight.shape[0] == len(result.tokenizer) < TOKEN_COUNT
    assert result.model.config.num_labels == CLASSES


def test_another_tokenizer_in_the_folder_is_seen(pruned, tmp_path):
    copy = shutil.copytree(pruned, tmp_path / "copy")
    vocab = json.loads((copy / "tokenizer.json").read_text())["model"]["vocab"]
    fields("tokenizer.json", model__vocab={**vocab, "t": vocab["h"], "h": vocab["t"]})(copy)
    write_manifest(copy)
    with expect_error(ProofError, name="config"):
        mptk.verify(copy)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
        ("decoder", {"type": "Fuse"}),
    ],
)
def test_a_written_tokenizer_must_read_and_write_as_the_dense_one(tmp_path, part, value):
    """Added, special and rare tokens, whatever the files say."""
    dense = testing.make_tokenizer()
    dense.add_tokens(["<Added>"])
    dense.save_pretrained(tmp_path)
    check_same_reading(dense, t.AutoTokenizer.from_pretrained(tmp_path), None)
    fields("tokenizer.json", **{part: value})(tmp_path)
    with expect_error(ProofError, name="config"):
        check_same_reading(dense, t.AutoTokenizer.from_pretrained(tmp_path), None)


def test_a_report_of_the_format_before_is_read_and_one_that_names_other_tokens_not_believed(pruned, tmp_path):
    copy = shutil.copytree(pruned, tmp_path / "copy")
    before = raw_report(copy)
    rows = before.pop("rows")
    before |= {"format": "mptk-report/1", "search": {}, "kv_heads": {}, "vocabulary": rows["vocabulary"]}
    (copy / "report.json").write_text(json.dumps(before))
    assert mptk.Report.read(copy) == mptk.Report.read(pruned)
    shutil.copy(pruned / "report.json", copy)
    fields("report.json", rows__vocabulary__kept=rows["vocabulary"]["kept"] + 2)(copy)
    write_manifest(copy)
    with expect_error(FileError, name="vocabulary"):
        mptk.verify(copy)


def test_what_cannot_be_done_is_refused(dense, pruned, tmp_path):
    missing = str(dense / "nothing.txt")
    for more, kind, about in (
        ({"plan": str(pruned / "plan.json")}, InputError, "vocabulary"),
        ({"vocabulary": "self"}, DataError, "self"),
        ({"vocabulary": []}, InputError, "vocabulary"),
        ({"data": torch.ones(4, 24, dtype=torch.long)}, InputError, "data"),
        ({"vocabulary": missing}, FileError, missing),
    ):
        with expect_error(kind, name=about):
            mptk.prune(str(dense), **{**ALONE, **more})
    with expect_error(FileError):
        mptk.prune(testing.make_llama(layers=1), **{**ALONE, "data": "random"})
    with expect_error(InputError, name="vocabulary"):
        mptk.prune(Small(lambda x: x), example_inputs=torch.randn(4, 7), vocabulary=[TEXT], progress=None)
    shutil.copy(pruned / "plan.json", tmp_path)
    fields("plan.json", vocabulary__of=999)(tmp_path)
    with expect_error(PlanError, name="vocabulary"):
        mptk.prune(str(dense), **{**FEW, "plan": str(tmp_path / "plan.json"), "data": [TEXT]}, progress=None)
    with expect_error(PlanError, name="vocabulary"):
        mptk.rewrite(mptk.analyze(testing.make_llama(layers=1, tied=False)), Plan.load(pruned / "plan.json"))
