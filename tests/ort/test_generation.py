"""Export and generation in ONNX Runtime against transformers' own, batches of unequal prompts, sampling, commands.

It reaches for mptk.ort: single steps of the decoder are compared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from commands import done
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from mptk import Settings
from mptk.api.graphs import export_folder, find_onnx_folder
from mptk.errors import FileError
from mptk.ort.decoder import OrtDecoder
from mptk.ort.generation import Sampling, TextGenerator, encode_prompts, generate_tokens
from mptk.testing import expect_error, make_llama, make_tokenizer, save_model

PROMPTS = [[5, 9, 31, 7], [8], [40, 41, 42, 43, 44, 45, 46]]
NEW = 12
QUANTIZED = {f"model_{ending}.{kind}" for ending in ("quantized", "q4") for kind in ("onnx", "onnx_data")}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    model = make_llama(layers=1)
    for parameter in model.parameters():
        parameter.data.mul_(6)
    return Path(save_model(model, tmp_path_factory.mktemp("dense")))


@pytest.fixture(scope="module")
def folder(source, tmp_path_factory):
    return export_folder(str(source), tmp_path_factory.mktemp("out") / "exported", Settings(quantize=("int8", "int4")))


@pytest.fixture(scope="module")
def decoder(folder):
    return OrtDecoder(folder, threads=1)


def greedy(model, prompt: list[int]) -> list[int]:
    with torch.no_grad():
        found = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return found[0, len(prompt) :].tolist()


def test_greedy_tokens_of_a_batch_are_those_of_transformers_alone(source, decoder):
    """No padding token is ever seen, wherever it is."""
    model = AutoModelForCausalLM.from_pretrained(source)
    steps = list(generate_tokens(decoder, PROMPTS, limit=NEW))
    for prompt, tokens in zip(PROMPTS, zip(*steps, strict=True), strict=True):
        expected = greedy(model, prompt)
        assert list(tokens[: len(expected)]) == expected


def test_a_sequence_ends_at_its_stop_token_and_the_rest_go_on(decoder):
    full = list(zip(*generate_tokens(decoder, PROMPTS, limit=NEW), strict=True))
    stop = full[0][2]
    found = list(zip(*generate_tokens(decoder, PROMPTS, limit=NEW, stop={stop}), strict=True))
    for before, after in zip(full, found, strict=True):
        end = before.index(stop) + 1 if stop in before else len(before)
        assert list(after[:end]) == list(before[:end])
        assert set(after[end:]) <= {None}
    assert len(list(generate_tokens(decoder, PROMPTS[:1], limit=NEW, stop={stop}))) == full[0].index(stop) + 1


def test_draws_repeat_with_their_seed_and_follow_the_distribution():
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]] * 4000, dtype=np.float32))

    def shares(sampling: Sampling) -> np.ndarray:
        return np.bincount(sampling.choose(logits, np.random.default_rng(1)), minlength=4) / len(logits)

    np.testing.assert_allclose(shares(Sampling(1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(Sampling(1.0, top_k=2)), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(Sampling(1.0, top_k=0, top_p=0.9)), [0.526, 0.316, 0.158, 0], atol=0.03)
    assert (shares(Sampling(1.0, top_k=0, top_p=0.45)))[0] == 1
    np.testing.assert_allclose(shares(Sampling(0.5)), np.array([25, 9, 2.25, 0.25]) / 36.5, atol=0.03)
    assert shares(Sampling(0.0))[0] == 1


def test_sampled_text_repeats_with_its_seed(decoder):
    how = {"limit": 6, "sampling": Sampling(1.5, top_k=0)}
    one, again, other = (list(generate_tokens(decoder, PROMPTS, **how, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other


def test_the_exported_folder_has_what_consumers_look_for(source, folder):
    assert AutoConfig.from_pretrained(folder).hidden_size == AutoConfig.from_pretrained(source).hidden_size
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids == AutoTokenizer.from_pretrained(source)("a").input_ids
    names = {path.name for path in (folder / "onnx").iterdir()}
    assert names == {"model.onnx", "model.onnx_data", *QUANTIZED}
    assert not list(folder.glob("*.safetensors"))
    assert find_onnx_folder(str(folder)) == find_onnx_folder(str(folder / "onnx")) == folder / "onnx"


def test_a_graph_for_prefill_and_last_logits_keeps_its_heads_and_gives_the_same_ones(source, folder, decoder, tmp_path):
    done("export", source, "--out", tmp_path / "out", "--objective", "prefill", "--logits", "last")
    ids = np.array([PROMPTS[2]])
    last = OrtDecoder(tmp_path / "out", threads=1)
    assert (last.metadata["objective"], decoder.metadata["objective"]) == ("prefill", "decode")
    assert (last.last_only, decoder.last_only) == (True, False)
    np.testing.assert_allclose(last.compute_logits(ids), decoder.compute_logits(ids)[:, -1:], atol=1e-4)
    with expect_error(FileError, name="logits"):
        last.compute_torch_logits(torch.tensor(ids))
    heads = []
    for place in (tmp_path / "out", folder):
        graph = onnx.load(place / "onnx" / "model.onnx", load_external_data=False).graph
        attention = next(node for node in graph.node if node.op_type == "Attention")
        heads.append({a.name: a.i for a in attention.attribute}["q_num_heads"])
    config = AutoConfig.from_pretrained(source)
    assert heads == [config.num_attention_heads, config.num_key_value_heads]


def test_commands_generate_and_eval(folder, source, tmp_path):
    run = done("generate", folder, "the cat", "--max-new-tokens", "5")
    generator = TextGenerator(folder)
    tokens = list(generator.stream(encode_prompts(generator.tokenizer, ["the cat"], chat=False), limit=5))
    assert run.stdout.strip() == make_tokenizer().decode([t for (t,) in tokens], skip_special_tokens=True).strip()
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 60)
    values = []
    for model, runtime in ((source, "torch"), (folder, "onnx"), (folder / "onnx" / "model_quantized.onnx", "onnx")):
        run = done("eval", model, "--runtime", runtime, "--data", text, "--length", "32")
        values.append(float(run.stdout.split()[1]))
    dense, plain, int8 = values
    assert plain == pytest.approx(dense, rel=1e-3)
    assert int8 != plain
    assert int8 == pytest.approx(dense, rel=0.3)


def test_export_rounds_int4_for_a_text(source, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    done("export", source, "--out", tmp_path / "for", "--quantize", "int4", "--data", text)
    by_itself, for_text = (place / "onnx" / "model_q4.onnx_data" for place in (folder, tmp_path / "for"))
    assert by_itself.stat().st_size == for_text.stat().st_size
    assert by_itself.read_bytes() != for_text.read_bytes()
