"""Broken GGUF files that ``verify`` must refuse: some rows of ``tests/broken``, whose command runs all; and faults of the
code that writes them, which must be noticed before a file is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as library
import pytest

import mptk
from mptk import ProofError
from mptk.features.gguf import api, llama_cpp
from mptk.features.gguf.architectures import ARCHITECTURES
from tests.broken import Published, check, named
from tests.broken import gguf as gguf_files

AGAIN = "do not use it, and write it again"
GGUF_SAID = {
    "rope base × 1.1": "llama.rope.freq_base in out.gguf is 11000.0, but 10000.0 in the folder",
    "epsilon as a double": "layer_norm_rms_epsilon in out.gguf is of a type that llama.cpp does not read",
    "soft-capped logits": "llama.final_logit_softcapping in out.gguf does not follow from the folder",
    "two tokens swapped": "tokenizer.ggml.tokens[200] in out.gguf is 'Ċ', but 'ĉ' in the folder",
    "the last token missing": "the length of tokenizer.ggml.tokens in out.gguf is 299, but 300",
    "eos missing": "tokenizer.ggml.eos_token_id in out.gguf is missing, but 1 in the folder",
    "pre-tokenizer of SmolLM": "tokenizer.ggml.pre in out.gguf is 'smollm', which splits at ' 12' otherwise",
    "pre-tokenizer of LLaMA 3": "is 'llama-bpe', which takes whole words first, unlike the folder's",
    "pre-tokenizer missing": "tokenizer.ggml.pre in out.gguf is None, which mptk cannot compare",
    "one number off by the last bit": "blk.0.attn_q.weight in out.gguf is not the folder's",
    "a matrix in 4 bits": "the type of blk.0.ffn_up.weight in out.gguf is 'Q4_0', but 'F32' in the folder",
    "a bias more": "blk.0.attn_q.bias in out.gguf is not a tensor of the folder",
    "bytes more": "out.gguf is damaged: it has",
}
"""Row → what verify says. Each is found in a way of its own."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A GGUF file, beside the folder ``out`` that it was made from."""
    return gguf_files.publish(gguf_files.PLAIN, tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize("name", GGUF_SAID)
def test_verify_refuses_a_gguf_file_by_its_field(written: Published, name: str) -> None:
    by = check(named(gguf_files.ROWS, gguf_files.PLAIN)[name], written)
    assert GGUF_SAID[name] in by
    assert "\n" not in by


@pytest.mark.long
@pytest.mark.parametrize("kind", [kind for kind in gguf_files.KINDS if kind != gguf_files.PLAIN])
def test_verify_refuses_gguf_files_of_other_kinds(kind: str, tmp_path: Path) -> None:
    published = gguf_files.publish(kind, tmp_path)
    published.verify(published.place)
    assert [name for name, row in named(gguf_files.ROWS, kind).items() if not check(row, published)] == []


# ---- faults of the code that writes ----

WRITING: dict[str, tuple[Callable[[Any], Any], str]] = {
    "rope_freq_base": (lambda value: 1.1 * value, r"llama\.rope\.freq_base in out\.gguf is 11000\.0, but 10000\.0"),
    "layer_norm_rms_eps": (lambda value: 1e-2, r"layer_norm_rms_epsilon in out\.gguf is 0\.00999.*, but 1e-06"),
    "rope_dimension_count": (lambda value: value // 2, r"rope\.dimension_count in out\.gguf is 16, but 32"),
    "context_length": (lambda value: 4 * value, r"context_length in out\.gguf is 512, but 128"),
    "head_count_kv": (lambda value: 2 * value, r"attention\.head_count_kv in out\.gguf is 2, but 1"),
    "token_list": (lambda value: [value[1], value[0], *value[2:]], r"tokens\[0\] in out\.gguf is '</s>', but '<s>'"),
    "token_types": (lambda value: [1] * len(value), r"token_type\[0\] in out\.gguf is 1, but 3"),
    "token_merges": (lambda value: value[::-1], r"merges\[0\] in out\.gguf is .*, but 'a r'"),
    "eos_token_id": (lambda value: 5, r"eos_token_id in out\.gguf is 5, but 1"),
    "bos_token_id": (lambda value: 5, r"bos_token_id in out\.gguf is 5, but 0"),
    "add_bos_token": (lambda value: not value, r"add_bos_token in out\.gguf is False, but True"),
    "tokenizer_pre": (lambda value: "qwen2", r"tokenizer\.ggml\.pre in out\.gguf is 'qwen2', which splits"),
    "chat_template": (lambda value: value[1:], r"tokenizer\.chat_template in out\.gguf is"),
}
"""A method of gguf's writer, without its ``add_`` → what it is given in place of the right value, and the error."""


@pytest.mark.parametrize("name", WRITING)
def test_a_fault_of_the_writer_is_noticed(
    written: Published, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, said = WRITING[name]
    real = getattr(library.GGUFWriter, f"add_{name}")
    monkeypatch.setattr(library.GGUFWriter, f"add_{name}", lambda self, value: real(self, change(value)))
    with pytest.raises(ProofError, match=said) as error:
        api.gguf(written.place.with_name("out"), tmp_path / "out.gguf")
    assert str(error.value).startswith("the proof fails: ")
    assert str(error.value).endswith(AGAIN)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_what_mptk_cannot_see_llama_cpp_does(
    written: Published, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of heads in transformers' order: the table that says how they are stored is the same for both sides."""
    pytest.importorskip("xllamacpp")
    monkeypatch.setitem(ARCHITECTURES, "llama", replace(ARCHITECTURES["llama"], changes={}))
    with pytest.raises(ProofError, match=r"llama\.cpp computes other logits of out\.gguf than transformers"):
        api.gguf(written.place.with_name("out"), tmp_path / "out.gguf", type=kind)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_llama_cpp_does_not_read(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    (tmp_path / "out.gguf").write_bytes(b"GGUF")
    assert "Failed" in str(llama_cpp.log_probabilities(tmp_path / "out.gguf", [[1, 2]], 5, 5))


def test_without_llama_cpp_a_note_says_so(written: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mptk.features.gguf.prove.has_llama_cpp", lambda: False)
    proof = mptk.verify(written.place, like=written.place.with_name("out"))
    assert [row.stage for row in proof] == ["GGUF fields", "GGUF tensors"]
    assert proof.notes == ["llama.cpp was not asked, as it is not installed; run: pip install 'mptk[llama-cpp]'"]


# ---- the command ----


def test_the_command_proves_a_gguf_file(
    written: Published, typed: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = written.place, written.place.with_name("out")
    assert typed("verify", file, "--like", folder) == 0
    assert "GGUF fields" in capsys.readouterr().out
    for words, said in (
        ((file,), "is a GGUF file, which is proven against the folder that it was made from; add --like DIR"),
        ((folder, "--like", folder), "--like is the folder of a GGUF file, and"),
        ((file.with_name("no.gguf"), "--like", folder), "there is no file"),
    ):
        assert typed("verify", *words) == 1
        assert said in capsys.readouterr().err.replace("\n", " ")


def test_a_models_name_is_no_folder_of_a_file(typed: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert typed("gguf", "smollm2-135m", "--out", "x.gguf") == 1
    said = "smollm2-135m is a model's name, and here a folder is needed; `mptk prune smollm2-135m --out DIR` makes one"
    assert said in capsys.readouterr().err.replace("\n", " ")
