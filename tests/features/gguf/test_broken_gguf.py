"""Broken GGUF files that ``verify`` must refuse: some rows of ``tests/broken``, whose command runs all; and faults of the
code that writes them, which must be noticed before a file is there.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf as library
import pytest
from commands import done
from typer.testing import CliRunner

import mptk
from mptk import ProofError
from mptk.cli.main import app
from mptk.errors import FileError, InputError
from mptk.features.gguf import api, llama_cpp
from mptk.features.gguf.architectures import ARCHITECTURES
from mptk.testing import expect_error
from tests.broken import Published, check, named
from tests.broken import gguf as gguf_files

FIELDS = {
    "rope base × 1.1": "llama.rope.freq_base",
    "epsilon as a double": "llama.attention.layer_norm_rms_epsilon",
    "soft-capped logits": "llama.final_logit_softcapping",
    "two tokens swapped": "tokenizer.ggml.tokens[200]",
    "the last token missing": "the length of tokenizer.ggml.tokens",
    "eos missing": "tokenizer.ggml.eos_token_id",
    "pre-tokenizer of SmolLM": "tokenizer.ggml.pre",
    "pre-tokenizer of LLaMA 3": "tokenizer.ggml.pre",
    "pre-tokenizer missing": "tokenizer.ggml.pre",
    "one number off by the last bit": "blk.0.attn_q.weight",
    "a matrix in 4 bits": "the type of blk.0.ffn_up.weight",
    "a bias more": "blk.0.attn_q.bias",
}
"""Row → what verify names. Each is found in a way of its own."""


@pytest.fixture(scope="module")
def written(laboratory):
    """A GGUF file, beside the folder ``out`` that it was made from."""
    place = laboratory.keep("gguf/plain", lambda root: gguf_files.publish(gguf_files.PLAIN, root))
    return Published(place / "out.gguf", partial(mptk.verify, like=place / "out"))


@pytest.mark.parametrize("name", FIELDS)
def test_verify_refuses_a_gguf_file_by_its_field(written, name, tmp_path):
    copy = Path(shutil.copy(written.place, tmp_path))
    named(gguf_files.ROWS, gguf_files.PLAIN)[name].damage(copy)
    with expect_error(ProofError, name=FIELDS[name]):
        written.verify(copy)


def test_verify_refuses_bytes_after_the_tensors(written):
    assert check(named(gguf_files.ROWS, gguf_files.PLAIN)["bytes more"], written)


# ---- faults of the code that writes ----

WRITING = {
    "rope_freq_base": (lambda value: 1.1 * value, "llama.rope.freq_base"),
    "layer_norm_rms_eps": (lambda value: 1e-2, "llama.attention.layer_norm_rms_epsilon"),
    "rope_dimension_count": (lambda value: value // 2, "llama.rope.dimension_count"),
    "context_length": (lambda value: 4 * value, "llama.context_length"),
    "head_count_kv": (lambda value: 2 * value, "llama.attention.head_count_kv"),
    "token_list": (lambda value: [value[1], value[0], *value[2:]], "tokenizer.ggml.tokens[0]"),
    "token_types": (lambda value: [1] * len(value), "tokenizer.ggml.token_type[0]"),
    "token_merges": (lambda value: value[::-1], "tokenizer.ggml.merges[0]"),
    "eos_token_id": (lambda value: 5, "tokenizer.ggml.eos_token_id"),
    "bos_token_id": (lambda value: 5, "tokenizer.ggml.bos_token_id"),
    "add_bos_token": (lambda value: not value, "tokenizer.ggml.add_bos_token"),
    "tokenizer_pre": (lambda value: "qwen2", "tokenizer.ggml.pre"),
    "chat_template": (lambda value: value[1:], "tokenizer.chat_template"),
}
"""A method of gguf's writer, without its ``add_`` → what it is given in place of the right value, and the field."""


@pytest.mark.parametrize("name", WRITING)
def test_a_fault_of_the_writer_is_noticed(written, name, tmp_path, monkeypatch):
    change, field = WRITING[name]
    real = getattr(library.GGUFWriter, f"add_{name}")
    monkeypatch.setattr(library.GGUFWriter, f"add_{name}", lambda self, value: real(self, change(value)))
    with expect_error(ProofError, name=field):
        api.gguf(written.place.with_name("out"), tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_what_mptk_cannot_see_llama_cpp_does(written, kind, tmp_path, monkeypatch):
    """Rows of heads in transformers' order: the table that says how they are stored is the same for both sides."""
    pytest.importorskip("xllamacpp")
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], changes={}))
    with expect_error(ProofError, name="out.gguf"):
        api.gguf(written.place.with_name("out"), tmp_path / "out.gguf", type=kind)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "other.gguf").write_bytes(b"GGUF")  # it is not read
    assert "Failed" in str(llama_cpp.log_probabilities(tmp_path / "other.gguf", [[1, 2]], 5, 5))


def test_without_llama_cpp_a_note_says_so(written, monkeypatch):
    monkeypatch.setattr("mptk.features.gguf.prove.has_llama_cpp", lambda: False)
    proof = mptk.verify(written.place, like=written.place.with_name("out"))
    assert [row.stage for row in proof] == ["GGUF fields", "GGUF tensors"]
    assert proof.notes


def test_the_command_proves_a_gguf_file(written):
    file, folder = written.place, written.place.with_name("out")
    assert "GGUF fields" in done("verify", file, "--like", folder).output
    missing = file.with_name("no.gguf")
    for words, kind, name in (
        (["verify", file], InputError, "like"),
        (["verify", folder, "--like", folder], InputError, "like"),
        (["verify", missing, "--like", folder], FileError, str(missing)),
        (["gguf", "smollm2-135m", "--out", "x.gguf"], FileError, "smollm2-135m"),
    ):
        with expect_error(kind, name=name):
            CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
