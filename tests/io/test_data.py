"""Text from files and data sets, windows of tokens, and text sampled from the model.

It reaches for mptk.io.data: a run does not show its windows.
"""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from toy_checkpoints import texts
from transformers import BertConfig, BertModel

from mptk import testing
from mptk.errors import InputError, ModelError
from mptk.io import data
from mptk.io.text.sampled import sample_text
from mptk.testing import expect_error


@pytest.fixture(scope="module")
def model():
    return testing.make_llama()


class TestLoadText:
    @pytest.mark.parametrize("column", ["text", "story"])
    def test_rows_are_documents(self, tmp_path, column):
        rows = [{column: "one", "stars": 3}, {column: " ", "stars": 4}, {column: "two\nlines", "stars": 5}]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        for name in ("a.jsonl", "a.parquet"):
            assert texts(str(tmp_path / name)) == ["one", "two\nlines"]

    def test_text_column_goes_before_others(self, tmp_path):
        (tmp_path / "a.jsonl").write_text(json.dumps({"title": "t", "text": "body"}))
        assert texts(str(tmp_path / "a.jsonl")) == ["body"]

    def test_folder_holds_all_its_files(self, tmp_path):
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "1.txt").write_text("second\n\nhalf")
        (tmp_path / "a.jsonl").write_text(json.dumps({"text": "first"}))
        (tmp_path / "picture.png").write_bytes(b"\x89")
        assert texts(str(tmp_path)) == ["first", "second\n\nhalf"]


class TestTokenWindows:
    def test_the_stream_is_cut_without_overlap(self):
        tokenizer = testing.make_tokenizer()
        whole = tokenizer(testing.SENTENCES).input_ids
        windows = data.make_token_windows([testing.SENTENCES], tokenizer, 7, seed=None)
        assert windows.dtype == torch.int64
        assert windows.shape == (len(whole) // 7, 7)
        assert windows.flatten().tolist() == whole[: windows.numel()]

    def test_end_of_sequence_between_documents(self):
        tokenizer = testing.make_tokenizer()
        fox, dog = tokenizer("the fox").input_ids, tokenizer("lazy dog").input_ids
        windows = data.make_token_windows(["the fox", "lazy dog"], tokenizer, len(fox) + 1 + len(dog), seed=None)
        assert windows.tolist() == [[*fox, tokenizer.eos_token_id, *dog]]

    def test_begin_of_sequence_where_the_tokenizer_sets_it(self):
        tokenizer = testing.make_tokenizer(begin=True)
        windows = data.make_token_windows([testing.SENTENCES], tokenizer, 7, seed=None)
        assert set(windows[:, 0].tolist()) == {tokenizer.bos_token_id}
        text = tokenizer(testing.SENTENCES).input_ids[1:]
        assert windows[:, 1:].flatten().tolist() == text[: len(windows) * 6]

    def test_seed_chooses_windows(self):
        tokenizer = testing.make_tokenizer()
        ordered = data.make_token_windows([testing.SENTENCES], tokenizer, 7, seed=None).tolist()
        first, same, other = (
            data.make_token_windows([testing.SENTENCES], tokenizer, 7, 5, seed).tolist() for seed in (1, 1, 2)
        )
        assert first == same != other
        assert len(first) == 5
        assert all(window in ordered for window in first)
        assert first != ordered[:5]
        assert sorted(data.make_token_windows([testing.SENTENCES], tokenizer, 7, seed=1).tolist()) == sorted(ordered)


class TestSelfSampled:
    def test_shape_start_and_seed(self, model):
        tokenizer = testing.make_tokenizer(begin=True)
        state = torch.get_rng_state()
        first, same, other = (
            sample_text(model, tokenizer, count=5, length=11, seed=seed, batch_size=3) for seed in (1, 1, 2)
        )
        assert torch.equal(state, torch.get_rng_state())
        assert first.shape == (5, 11)
        assert first.dtype == torch.int64
        assert torch.equal(first, same)
        assert not torch.equal(first, other)
        assert not torch.equal(first[0], first[3])
        assert set(first[:, 0].tolist()) == {tokenizer.bos_token_id}

    def test_more_rows_begin_with_the_same_ones(self, model):
        few = sample_text(model, None, count=3, length=11, seed=1)
        more = sample_text(model, None, count=7, length=11, seed=1, batch_size=2)
        assert torch.equal(more[:3], few)
        assert len({tuple(row) for row in more.tolist()}) == 7

    def test_follows_the_models_own_distribution(self):
        # A head that knows three tokens, the end of sequence (1) among them, at 20, 30 and 50 %.
        model = testing.make_llama(tied=False)
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.bias = torch.nn.Parameter(torch.full((300,), -30.0))
            model.lm_head.bias[[1, 7, 9]] = torch.tensor([0.2, 0.3, 0.5]).log()
        # What checkpoints bring along must not bend it.
        model.generation_config.update(temperature=0.1, top_k=1, repetition_penalty=9.0, max_length=5, do_sample=False)
        sample = sample_text(model, None, count=32, length=65, seed=0)[:, 1:].flatten()
        share = [(sample == token).float().mean().item() for token in (1, 7, 9)]
        assert share == pytest.approx([0.2, 0.3, 0.5], abs=0.04)
        assert model.generation_config.top_k == 1

    def test_without_begin_of_sequence(self, model):
        sample = sample_text(testing.make_llama(), testing.make_tokenizer(), count=2, length=5, seed=0)
        assert set(sample[:, 0].tolist()) == {model.config.bos_token_id}
        lone = testing.make_llama()
        lone.config.bos_token_id = lone.config.eos_token_id = None
        starts = sample_text(lone, None, count=9, length=4, seed=0)[:, 0]
        assert len(set(starts.tolist())) > 1

    def test_progress_ends_at_the_total(self, model):
        calls: list[tuple[int, int]] = []
        sample_text(model, None, count=5, length=6, seed=0, batch_size=2, progress=lambda *at: calls.append(at))
        assert calls == sorted(calls)
        assert calls[-1] == (30, 30)
        assert len(calls) > 10

    def test_encoder_cannot(self):
        encoder = BertModel(
            BertConfig(hidden_size=24, num_attention_heads=3, intermediate_size=40, num_hidden_layers=1, vocab_size=50)
        )
        with expect_error(ModelError, name="BertModel"):
            sample_text(encoder, None, count=1, length=4, seed=0)


class TestCalibration:
    def test_self_samples_only_what_no_run_before_has(self, model, tmp_path, set_cache):
        set_cache(tmp_path)

        def ask(count: int) -> tuple[torch.Tensor, int]:
            said: list[int] = []
            windows = data.load_calibration_windows(
                model, None, count=count, length=9, progress=lambda _, total: said.append(total)
            )
            return windows, said[-1] if said else 0

        (three, first), (five, second), (two, third) = ask(3), ask(5), ask(2)
        assert (first, second, third) == (3 * 9, 2 * 9, 0)
        assert torch.equal(five[:3], three)
        assert torch.equal(five, sample_text(model, None, count=5, length=9, seed=0))
        assert torch.equal(two, five[:2])

    def test_text(self, model, tmp_path):
        (tmp_path / "a.txt").write_text(testing.SENTENCES)
        windows = data.load_calibration_windows(model, testing.make_tokenizer(), str(tmp_path / "a.txt"), 3, 9, seed=4)
        assert torch.equal(windows, data.make_token_windows([testing.SENTENCES], testing.make_tokenizer(), 9, 3, 4))
        with expect_error(ModelError, name="tokenizer"):
            data.load_calibration_windows(model, None, str(tmp_path / "a.txt"), 3, 9)

    def test_longer_than_the_models_positions(self, model):
        with expect_error(InputError, name="windows of 71 tokens", nearest=[70]):
            data.load_calibration_windows(model, testing.make_tokenizer(), count=3, length=71)
