"""A GGUF file as a model: converted once to a checkpoint of floats; its config without that."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_checkpoints as toys
import transformers
from inside import Inside

from mptk import testing
from mptk.errors import ChangedError, FileError
from mptk.features.gguf.reading import dequantize_gguf
from mptk.io import cache, models
from mptk.testing import expect_error

IDS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def _cache(tmp_path, set_cache):
    set_cache(tmp_path / "cache")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def write(path: Path, *, quantise: bool = False, **how: Any) -> Path:
    toys.write_gguf(testing.make_llama(**how), testing.make_tokenizer(), path, quantise=quantise)
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "toy.gguf")


@pytest.mark.parametrize("tied", [True, False])
def test_same_model(tmp_path, tied):
    loaded = models.load(str(write(tmp_path / "toy.gguf", tied=tied)))
    assert torch.equal(logits(loaded.model), logits(testing.make_llama(tied=tied)))
    head, embedding = loaded.model.get_output_embeddings().weight, loaded.model.get_input_embeddings().weight
    assert (head is embedding) == tied
    ids = loaded.tokenizer("brown fox", add_special_tokens=False).input_ids
    assert ids == testing.make_tokenizer()("brown fox").input_ids
    assert loaded.tokenizer.model_max_length == 70


def test_quantised(tmp_path):
    loaded = models.load(str(write(tmp_path / "toy.gguf", quantise=True)))
    assert 0 < (logits(loaded.model) - logits(testing.make_llama())).abs().max() < 1e-2


def test_saved_as_an_ordinary_checkpoint(file, tmp_path):
    loaded = models.load(str(file))
    loaded.model.save_pretrained(tmp_path / "saved")
    for place in (loaded.path, tmp_path / "saved"):
        config = json.loads((place / "config.json").read_text())
        said = {"dtype": "float32", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
        assert {name: config[name] for name in said} == said
        assert "quantization_config" not in config
        written = "".join(path.read_text() for path in place.glob("*.json")).lower()
        assert "gguf" not in written
        assert "toy of the tests" not in written
        again = transformers.AutoModelForCausalLM.from_pretrained(place)
        assert torch.equal(logits(again), logits(testing.make_llama()))
        assert again.generation_config.eos_token_id == 1


def test_converted_once_and_again_when_it_changes(file):
    first = models.load(str(file)).path
    written = first.stat().st_ino
    assert models.load(str(file)).path == first
    assert first.stat().st_ino == written
    write(file, seed=1)
    assert torch.equal(logits(models.load(str(file)).model), logits(testing.make_llama(seed=1)))


def keep_digests_of(size: int, inside: Inside) -> None:
    """Of files of this size or larger, at once."""
    inside.bound("mptk.io.cache.HASHED_AT_ONCE", size)
    inside.bound("mptk.io.cache.SETTLED", 0)


@pytest.mark.parametrize("small", [1 << 20, 0])
def test_a_file_of_the_same_size_and_time_is_converted_again(file, small, inside):
    """As after ``cp -p`` and ``rsync -t``, in place of the file and into it; also if its digest is kept."""
    keep_digests_of(small, inside)
    models.load(str(file))
    state = file.stat()
    for seed, replaces in ((1, True), (2, False)):
        other = write(file.with_name("other.gguf"), seed=seed)
        os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
        if replaces:
            other.rename(file)
        else:
            file.write_bytes(other.read_bytes())
            os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
        assert torch.equal(logits(models.load(str(file)).model), logits(testing.make_llama(seed=seed)))


def test_a_kept_digest_is_used_and_no_other_file_is_taken_for_it(file, tmp_path, set_cache, inside):
    keep_digests_of(0, inside)
    first = cache.read_sha256(file)
    assert first == hashlib.sha256(file.read_bytes()).hexdigest()
    (kept,) = (tmp_path / "cache" / "digests").iterdir()
    for content in ("", json.dumps({"file": [1], "sha256": "0" * 64})):
        kept.write_text(content)
        assert cache.read_sha256(file) == first
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "sha256": "0" * 64}))
    assert cache.read_sha256(file) == "0" * 64, "the file is not read"
    kept.chmod(0o666)
    assert cache.read_sha256(file) == first, "others may have written it"
    set_cache("/proc/x")
    assert cache.read_sha256(file) == first


def test_what_is_no_gguf_and_a_file_that_changes_while_it_is_converted_are_refused(file, tmp_path, inside):
    def save(real, *given):
        real(*given)
        file.write_bytes(file.read_bytes() + b"x")

    inside.around("mptk.features.gguf.reading.save_checkpoint", save)
    with expect_error(ChangedError, name=file):
        models.load(str(file))
    for wrong in (tmp_path / "none.gguf", tmp_path / "broken.gguf"):
        (tmp_path / "broken.gguf").write_bytes(b"not one at all" * 9)
        with expect_error(FileError, name=wrong):
            models.load(str(wrong))
    assert not list((tmp_path / "cache" / "checkpoints").glob("[!.]*"))


def test_skeleton_reads_the_metadata_alone(file, tmp_path):
    skeleton = models.build_skeleton(str(file))
    assert not (tmp_path / "cache" / "checkpoints").exists()
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    found, expected = ({n: p.shape for n, p in m.named_parameters()} for m in (skeleton, testing.make_llama()))
    assert found == expected


def test_gguf_blocks_are_dequantised_if_transformers_can_keep_them():
    for config in dequantize_gguf().values():
        assert config.dequantize is True, "transformers changed GgufConfig; repair mptk/features/gguf"
