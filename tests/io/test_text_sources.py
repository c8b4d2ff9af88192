"""What --data may name: columns, chats, folders, several sources with weights, presets; long files are streamed."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_checkpoints import texts

from mptk import testing
from mptk.errors import DataError, FileError
from mptk.io import data
from mptk.io.text import files, tokens
from mptk.io.text.files import PIECE
from mptk.io.text.sources import PRESETS, HubText, parse_hub_text, share_count
from mptk.testing import expect_error

CHAT = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def chatty() -> object:
    tokenizer = testing.make_tokenizer(begin=True)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_rows(path: Path, *rows: dict) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


class TestColumns:
    def test_a_column_is_named_after_a_colon(self, tmp_path):
        path = write_rows(tmp_path / "a.jsonl", {"q": "why", "a": "so"}, {"q": "where", "a": "here"})
        assert texts(f"{path}:a") == ["so", "here"]
        with expect_error(DataError, name=path, nearest=["q", "a"]):
            texts(path)
        with expect_error(DataError, name=path) as refused:
            texts(f"{path}:z")
        assert {*refused.value.nearest} == {"q", "a"}

    def test_comma_and_tab_separated_and_compressed_tables(self, tmp_path):
        (tmp_path / "a.csv").write_text('title,body\none,"two, and"\nthree,four\n')
        (tmp_path / "a.tsv").write_text("title\tbody\none\ttwo\n")
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "packed"}\n'))
        assert texts(f"{tmp_path / 'a.csv'}:body") == ["two, and", "four"]
        assert texts(f"{tmp_path / 'a.tsv'}:title") == ["one"]
        assert texts(str(tmp_path / "a.jsonl.gz")) == ["packed"]

    @pytest.mark.parametrize(
        "row",
        [
            {"prompt": "why", "prompt_id": "7", "messages": CHAT},
            {"stars": 3, "conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]},
            {"dialogue": CHAT},
        ],
        ids=["before strings", "other names", "any column"],
    )
    def test_chats_go_through_the_template(self, tmp_path, row):
        path = write_rows(tmp_path / "a.jsonl", row)
        assert texts(path, chatty()) == ["[user] why\n[assistant] so\n"]
        with expect_error(DataError, name=path):
            texts(path, testing.make_tokenizer())

    def test_each_window_of_chats_has_one_begin_of_sequence(self, tmp_path):
        path = write_rows(tmp_path / "a.jsonl", *[{"messages": CHAT}] * 9)
        windows = data.load_evaluation_windows(chatty(), path, 11)
        assert (windows == chatty().bos_token_id).sum(1).tolist() == [1] * len(windows)


class TestFolders:
    def folder(self, tmp_path: Path) -> Path:
        for i in range(6):
            (tmp_path / f"{i}.py").write_text(f"word{i} " * 3000)
        return tmp_path

    @pytest.mark.parametrize("seed", [0, 1])
    def test_a_short_run_reads_all_files(self, tmp_path, seed):
        tokenizer, folder = testing.make_tokenizer(), self.folder(tmp_path)
        windows = data.load_calibration_windows(testing.make_llama(), tokenizer, str(folder), 60, 16, seed=seed)
        seen = {i for i in range(6) if any(f"word{i}" in tokenizer.decode(row) for row in windows)}
        assert seen == set(range(6))

    def test_evaluation_is_over_all_files_and_says_so(self, tmp_path):
        tokenizer, folder = testing.make_tokenizer(), str(self.folder(tmp_path))
        windows = data.load_evaluation_windows(tokenizer, folder, 16, 60)
        assert sum(any(f"word{i}" in tokenizer.decode(row) for row in windows) for i in range(6)) == 6
        assert torch.equal(windows, data.load_evaluation_windows(tokenizer, folder, 16, 60))
        assert data.name_data(folder) == f"{folder} (windows of all files of {folder}, seed 0)"
        assert data.name_data(f"{folder}/1.py") == f"{folder}/1.py"

    def test_what_is_no_text_is_left_out(self, tmp_path):
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git" / "index.txt").write_text("hidden")
        (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
        (tmp_path / "package.json").write_text('{\n  "name": "a",\n  "text": "b"\n}')
        (tmp_path / "rows.json").write_text('{"text": "a row"}\n{"text": "another"}')
        (tmp_path / "code").write_text("code")
        documents = files.read_folder_documents(tmp_path, characters=10**6, least=100)
        found = sorted("".join(document) for document in documents)
        assert found == ["a row", "another", "code", '{\n  "name": "a",\n  "text": "b"\n}']


class TestWeights:
    def test_windows_are_shared_out(self, tmp_path):
        tokenizer = testing.make_tokenizer()
        (tmp_path / "a.txt").write_text("fox " * 4000)
        (tmp_path / "b.txt").write_text("dog " * 4000)
        mixed = f"{tmp_path / 'a.txt'}=0.7,{tmp_path / 'b.txt'}=0.3"
        calibration = data.load_calibration_windows(testing.make_llama(), tokenizer, mixed, 20, 16, seed=3)
        kinds = ["fox" in tokenizer.decode(row) for row in calibration]
        assert (len(kinds), sum(kinds)) == (20, 14)
        assert kinds != sorted(kinds, reverse=True), "in a random order"
        evaluation = data.load_evaluation_windows(tokenizer, mixed, 16, 20)
        assert ["fox" in tokenizer.decode(row) for row in evaluation] == [True] * 14 + [False] * 6

    def test_largest_remainders(self):
        assert share_count(10, [0.7, 0.3]) == [7, 3]
        assert share_count(2, [1, 1, 1]) == [1, 1, 0]
        assert share_count(7, [3, 1, 1]) == [4, 2, 1]

    def test_a_path_that_is_there_is_one_source(self, tmp_path):
        (tmp_path / "a=1,b:c.txt").write_text("odd name")
        assert texts(str(tmp_path / "a=1,b:c.txt")) == ["odd name"]


def write_data_set(folder: Path) -> str:
    """A data set of two splits that ``datasets`` opens without the hub, as it does one of the hub."""
    folder.mkdir()
    for split, text in (("train", "body"), ("test", "other")):
        write_rows(folder / f"{split}.jsonl", {"text": " = Title = \n"}, {"text": ""}, {"text": text})
    return str(folder)


class TestHubText:
    def test_a_name_says_configuration_split_and_column(self):
        assert parse_hub_text("org/set", held_out=False) == HubText("org/set")
        assert parse_hub_text("org/set:cfg", held_out=True) == HubText("org/set", "cfg", "test")
        assert parse_hub_text("org/set:cfg:some:q", held_out=True) == HubText("org/set", "cfg", "some", "q")
        assert parse_hub_text("wikitext2", held_out=False) == PRESETS["wikitext2"]
        assert parse_hub_text("c4", held_out=True) == replace(PRESETS["c4"], split="validation")

    def test_rows_are_documents_or_one_text(self, tmp_path):
        name = write_data_set(tmp_path / "set")
        assert ["".join(d) for d in HubText(name).read_documents(None)] == [" = Title = \n", "", "body"]
        joined = HubText(name, split="test", column="text", joined="\n\n")
        assert ["".join(document) for document in joined.read_documents(None)] == [" = Title = \n\n\n\n\nother\n\n"]

    def test_without_network_it_is_one_line(self, go_to, tmp_path):
        go_to(tmp_path)
        for name, preset in PRESETS.items():
            with expect_error(FileError, name=preset.id) as refused:
                texts(name)
            assert "\n" not in str(refused.value)


class TestLongTexts:
    def test_pieces_have_the_tokens_of_the_whole(self):
        long = testing.SENTENCES * (3 * PIECE // len(testing.SENTENCES) + 1)
        for start in (0, 7):  # the pieces end in other words
            text = long[start:]
            assert len(list(tokens.split_text([text[:50], text[50:]]))) > 3
            assert (
                tokens.encode_documents([[text]], testing.make_tokenizer()).tolist()
                == testing.make_tokenizer()(text).input_ids
            )

    def test_a_text_without_spaces_loses_nothing(self):
        words = "one two three four five six seven" * (PIECE // 10)
        for spaced in (True, False):
            assert "".join(tokens.split_text(["x" * 3 * PIECE], spaced)) == "x" * 3 * PIECE
        assert "".join(tokens.split_text([words], True)) == words
        assert " ".join(tokens.split_text([words], False)) == words

    def test_no_more_is_read_than_is_wanted(self):
        read = 0

        def endless():
            nonlocal read
            while True:
                read += 1
                yield "seven wizards " * 1000

        assert len(tokens.encode_documents([endless()], testing.make_tokenizer(), tokens=500)) >= 500
        assert read < 10
        tokens.encode_documents(([text] for text in endless()), testing.make_tokenizer(), characters=10_000)
        assert read < 20

    def test_a_long_line_is_read_in_pieces(self, tmp_path):
        (tmp_path / "long.txt").write_text("wizards mix jars of honey " * 200_000)
        (document,) = data.read_documents(str(tmp_path / "long.txt"), None)
        pieces = [len(piece) for piece in document]
        assert sum(pieces) == 26 * 200_000
        assert max(pieces) <= PIECE


class TestSelfSampledIsKept:
    def test_the_same_text_is_sampled_once(self, tmp_path, set_cache):
        set_cache(tmp_path)
        written = []

        def text(model=None, **options):
            say = lambda done, total: written.append(total) if done == total else None  # noqa: E731
            return data.load_calibration_windows(
                model or testing.make_llama(), testing.make_tokenizer(), count=3, length=9, progress=say, **options
            )

        first = text(seed=4)
        assert torch.equal(first, text(seed=4))
        assert len(written) == 1
        assert not torch.equal(first, text(seed=5))
        text(testing.make_llama(seed=1), seed=4)
        assert len(written) == 3, "another seed and other weights are sampled anew"
        for path in (tmp_path / "self").iterdir():
            path.write_bytes(b"damaged")
        assert torch.equal(first, text(seed=4))

    def test_a_cache_that_cannot_be_written_is_no_error(self, tmp_path, set_cache):
        (tmp_path / "file").write_text("no folder")
        set_cache(tmp_path / "file")
        assert data.load_calibration_windows(testing.make_llama(), None, count=2, length=5).shape == (2, 5)


def test_digests_of_windows_and_files(tmp_path):
    windows = torch.arange(12).view(3, 4)
    expected = hashlib.sha256(b"".join(int(i).to_bytes(8, "little") for i in range(12))).hexdigest()
    assert data.hash_windows(windows) == data.hash_windows(windows.t().contiguous().t()) == expected
    (tmp_path / "a.txt").write_text("a")
    found = data.hash_text_files(str(tmp_path / "a.txt"), None, "self")
    assert found == {str(tmp_path / "a.txt"): hashlib.sha256(b"a").hexdigest()}
    assert data.hash_text_files(str(tmp_path)) == found
