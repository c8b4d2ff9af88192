"""Side files: folders with one wrong field or one planted file that a loader acts on. ``mptk verify DIR`` must refuse."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lab import fields, write_lab
from safetensors.torch import load_file, save_file

from mptk.files import write_json
from tests.broken import Broken, Published, prove_by_one_trace

Edit = Callable[[Path], None]
KIND = "side files"
CONFIG, GENERATION, TOKENIZER, WORDS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)
WEIGHTS, GENAI, REPORT = "model.safetensors", "genai_config.json", "report.json"
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def plant(name: str, content: str | bytes = "{}") -> Edit:
    def damage(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(content)

    return damage


def into(name: str, change: Callable[[dict[str, Any]], object]) -> Edit:
    """A change of a JSON file's content."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        write_json(folder / name, content)

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object], **metadata: str) -> Edit:
    def damage(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt", **metadata})

    return damage


def delete(name: str) -> Edit:
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def copy(name: str, to: str) -> Edit:
    def damage(folder: Path) -> None:
        (folder / to).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, folder / to)

    return damage


def sharded(folder: Path) -> None:
    """An index beside the file, which sends a loader to another one."""
    state = load_file(folder / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in state.items()}, folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(state, "model-00001-of-00001.safetensors")
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})


def swap_header(folder: Path) -> None:
    """Two tensors of one shape with each other's name in the header."""
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    one, other = (f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))
    header[one]["data_offsets"], header[other]["data_offsets"] = (
        header[other]["data_offsets"],
        header[one]["data_offsets"],
    )
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


def inner(name: str, path: str, value: object) -> Edit:
    return fields(name, **{path: value})


PICKLE = b"\x80\x04N."
TRANSFORMER = json.dumps([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}])
MODEL_FILES: dict[str, Edit] = {
    # what config.json may not have, or has otherwise
    "config: weights in 4 bits": fields(CONFIG, quantization_config=BITS),
    "config: quantization_config without content": fields(CONFIG, quantization_config={}),
    "config: quantization_config of nothing": fields(CONFIG, quantization_config=None),
    "config: compression": fields(CONFIG, compression_config={"quant_method": "compressed-tensors"}),
    "config: code of its own": fields(CONFIG, auto_map={"AutoModelForCausalLM": "modeling.Other"}),
    "config: code of another repository": fields(CONFIG, auto_map={"AutoConfig": "a/b--configuration.Other"}),
    "config: another class": fields(CONFIG, architectures=["LlamaForCausalLM"]),
    "config: two classes": fields(CONFIG, architectures=["MistralForCausalLM", "LlamaForCausalLM"]),
    "config: another kind": fields(CONFIG, model_type="llama"),
    "config: weights elsewhere": fields(CONFIG, transformers_weights="other.safetensors"),
    "config: a field that nobody knows": fields(CONFIG, unknown_field=1),
    "config: attention of another kind": fields(CONFIG, attn_implementation="flash_attention_2"),
    "config: attention of another kind, inside": fields(CONFIG, _attn_implementation="flash_attention_2"),
    "config: name of another model": fields(CONFIG, _name_or_path="a/b"),
    "config: another type": fields(CONFIG, dtype="float16"),
    "config: an older name of the type": fields(CONFIG, torch_dtype="float16"),
    "config: another window": fields(CONFIG, sliding_window=8),
    "config: no window": fields(CONFIG, sliding_window=None),
    "config: another rope base": fields(CONFIG, rope_theta=500.0),
    "config: another rope base, inside": inner(CONFIG, "rope_parameters__rope_theta", 500.0),
    "config: scaled rope": fields(CONFIG, rope_scaling={"rope_type": "linear", "factor": 2.0}),
    "config: another epsilon": fields(CONFIG, rms_norm_eps=1e-3),
    "config: tied": fields(CONFIG, tie_word_embeddings=False),
    "config: end of a text": fields(CONFIG, eos_token_id=7),
    "config: start of a text": fields(CONFIG, bos_token_id=7),
    "config: padding": fields(CONFIG, pad_token_id=7),
    "config: longest text": fields(CONFIG, max_position_embeddings=4096),
    "config: activation": fields(CONFIG, hidden_act="gelu"),
    "config: generation in it": fields(CONFIG, temperature=0.1),
    "config: no cache": fields(CONFIG, use_cache=False),
    "config: labels": fields(CONFIG, id2label={"0": "a", "1": "b", "2": "c"}),
    "config: dropout": fields(CONFIG, attention_dropout=0.5),
    "config: version of the writer": fields(CONFIG, transformers_version="99.0"),
    "config: sentence-transformers in it": fields(CONFIG, sentence_transformers={"version": "5.0"}),
    "config: transformers.js": into(CONFIG, lambda c: c["transformers.js_config"].update(dtype="q4")),
    "config: a second field of that name": lambda folder: (
        (folder / CONFIG).write_text((folder / CONFIG).read_text().replace("{", '{"hidden_act": "gelu",', 1)) and None
    ),
    # generation
    "generation: end of a text": fields(GENERATION, eos_token_id=7),
    "generation: ends": fields(GENERATION, eos_token_id=[1, 7]),
    "generation: start": fields(GENERATION, bos_token_id=7),
    "generation: temperature": fields(GENERATION, temperature=0.1, do_sample=True),
    "generation: forbidden tokens": fields(GENERATION, suppress_tokens=[5]),
    "generation: forced start": fields(GENERATION, forced_bos_token_id=5),
    "generation: penalty": fields(GENERATION, repetition_penalty=5.0),
    "generation: kind of cache": fields(GENERATION, cache_implementation="static"),
    "generation: code": fields(GENERATION, custom_generate="a/b"),
    "generation: a field that nobody knows": fields(GENERATION, unknown_field=1),
    "generation: longest text": fields(GENERATION, max_length=3),
    "generation: watermark": fields(GENERATION, watermarking_config={"bias": 9.0}),
    "generation: removed": delete(GENERATION),
    "generation: code in the folder": plant("custom_generate/generate.py", "def generate(*a, **k): pass\n"),
    # tokenizer
    "tokenizer: start of a text": fields(TOKENIZER, bos_token="w3"),
    "tokenizer: end of a text": fields(TOKENIZER, eos_token="w3"),
    "tokenizer: puts a start before text": fields(TOKENIZER, add_bos_token=True),
    "tokenizer: side of padding": fields(TOKENIZER, padding_side="left"),
    "tokenizer: longest text": fields(TOKENIZER, model_max_length=4),
    "tokenizer: names of inputs": fields(TOKENIZER, model_input_names=["input_ids"]),
    "tokenizer: code": fields(TOKENIZER, auto_map={"AutoTokenizer": ["tok.Tok", None]}),
    "tokenizer: code of another repository": fields(TOKENIZER, auto_map={"AutoTokenizer": ["a/b--tok.Tok", None]}),
    "tokenizer: template in it": fields(TOKENIZER, chat_template="{{ messages }}"),
    "tokenizer: class": fields(TOKENIZER, tokenizer_class="LlamaTokenizer"),
    "tokenizer: lower case": into(WORDS, lambda t: t.update(normalizer={"type": "Lowercase"})),
    "tokenizer: cuts text": into(
        WORDS,
        lambda t: t.update(truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}),
    ),
    "tokenizer: split otherwise": into(WORDS, lambda t: t.update(pre_tokenizer={"type": "WhitespaceSplit"})),
    "tokenizer: a special token less": into(WORDS, lambda t: t["added_tokens"].pop()),
    "tokenizer: removed": delete(WORDS),
    # files that a loader acts on
    "planted: special_tokens_map.json": plant("special_tokens_map.json", '{"eos_token": "w3"}'),
    "planted: added_tokens.json": plant("added_tokens.json", '{"<x>": 97}'),
    "planted: vocab.txt": plant("vocab.txt", "a\nb\n"),
    "planted: vocab.json": plant("vocab.json", '{"a": 0}'),
    "planted: merges.txt": plant("merges.txt", "a b\n"),
    "planted: tokenizer.model": plant("tokenizer.model", b"\0"),
    "planted: tekken.json": plant("tekken.json"),
    "planted: tokenizer.tiktoken": plant("tokenizer.tiktoken", "YQ== 0\n"),
    "planted: chat_template.jinja": plant("chat_template.jinja", "{{ messages }}"),
    "planted: chat_template.json": plant("chat_template.json", '{"chat_template": "x"}'),
    "planted: additional_chat_templates": plant("additional_chat_templates/tool_use.jinja", "{{ messages }}"),
    "planted: preprocessor_config.json": plant("preprocessor_config.json"),
    "planted: processor_config.json": plant("processor_config.json"),
    "planted: video_preprocessor_config.json": plant("video_preprocessor_config.json"),
    "planted: modules.json": plant("modules.json", TRANSFORMER),
    "planted: sentence_bert_config.json": plant("sentence_bert_config.json", '{"max_seq_length": 2}'),
    "planted: config_sentence_transformers.json": plant("config_sentence_transformers.json"),
    "planted: 1_Pooling": plant("1_Pooling/config.json", '{"pooling_mode_cls_token": true}'),
    "planted: 2_Dense": plant("2_Dense/config.json"),
    "planted: adapter_config.json": plant("adapter_config.json", '{"peft_type": "LORA"}'),
    "planted: adapter_model.safetensors": copy(WEIGHTS, "adapter_model.safetensors"),
    "planted: an index and other weights": sharded,
    "planted: an index only": plant("model.safetensors.index.json", '{"metadata": {}, "weight_map": {}}'),
    "planted: weights in another file": copy(WEIGHTS, "consolidated.safetensors"),
    "planted: weights in another variant": copy(WEIGHTS, "model.fp16.safetensors"),
    "planted: weights in a folder": copy(WEIGHTS, "original/model.safetensors"),
    "planted: pytorch_model.bin": plant("pytorch_model.bin", PICKLE),
    "planted: consolidated.00.pth": plant("consolidated.00.pth", PICKLE),
    "planted: tf_model.h5": plant("tf_model.h5", b"\0"),
    "planted: flax_model.msgpack": plant("flax_model.msgpack", b"\0"),
    "planted: model.gguf": plant("model.gguf", b"GGUF"),
    "planted: params.json": plant("params.json", '{"dim": 5}'),
    "planted: quantize_config.json": plant("quantize_config.json", '{"bits": 4}'),
    "planted: quant_config.json": plant("quant_config.json", '{"w_bit": 4}'),
    "planted: hf_quant_config.json": plant("hf_quant_config.json", '{"quantization": {"quant_algo": "FP8"}}'),
    "planted: recipe.yaml": plant("recipe.yaml", "a: 1\n"),
    "planted: model_index.json": plant("model_index.json", '{"_class_name": "DiffusionPipeline"}'),
    "planted: open_clip_config.json": plant("open_clip_config.json"),
    "planted: configuration.json": plant("configuration.json"),
    "planted: ort_config.json": plant("ort_config.json"),
    "planted: openvino_config.json": plant("openvino_config.json"),
    "planted: openvino_model.xml": plant("openvino_model.xml", "<net/>"),
    "planted: Python code": plant("modeling_mistral.py", "import os\n"),
    "planted: Python code in a folder": plant("sub/tokenization.py", "import os\n"),
    "planted: handler.py": plant("handler.py", "class EndpointHandler: pass\n"),
    "planted: requirements.txt": plant("requirements.txt", "evil\n"),
    "planted: a library": plant("kernel.so", b"\x7fELF"),
    "planted: a notebook": plant("run.ipynb"),
    "planted: .env": plant(".env", "HF_TOKEN=x\n"),
    "planted: .gitattributes": plant(".gitattributes", "* filter=x\n"),
    "planted: an ONNX graph": copy("onnx/model.onnx", "onnx/decoder_model_merged.onnx"),
    "planted: an int8 graph": copy("onnx/model.onnx", "onnx/model_quantized.onnx"),
    "planted: a graph of another scheme": copy("onnx/model.onnx", "onnx/model_bnb4.onnx"),
    "planted: weights beside a graph": copy("onnx/model.onnx_data", "onnx/model_bnb4.onnx_data"),
    "planted: a graph outside of its folder": copy("onnx/model.onnx", "model.onnx"),
    "planted: a plan of another folder": plant("rungs/0.5/plan.json"),
    "planted: compensation": plant("compensation.safetensors", b"\x08\0\0\0\0\0\0\0{}      "),
    "planted: LICENSE": plant("LICENSE", "Do what you want.\n"),
    # weights
    "weights: a tensor more": tensors(lambda s: s.update(extra=torch.zeros(2))),
    "weights: a tensor more, of another layer": tensors(
        lambda s: s.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)})
    ),
    "weights: an output matrix": tensors(lambda s: s.update({"lm_head.weight": 2 * s["model.embed_tokens.weight"]})),
    "weights: a buffer": tensors(lambda s: s.update({"model.rotary_emb.inv_freq": torch.zeros(4)})),
    "weights: scales of a quantisation": tensors(
        lambda s: s.update({"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)})
    ),
    "weights: two tensors swapped in the header": swap_header,
    "weights: another format": tensors(lambda s: None, format="flax"),
    "weights: more metadata": tensors(lambda s: None, quantization="fp8"),
    "weights: in half precision": tensors(lambda s: s.update({n: t.half() for n, t in s.items()})),
    "weights: one in half precision": tensors(lambda s: s.update({"model.norm.weight": s["model.norm.weight"].half()})),
    # files of mptk
    "genai: end of a text": fields(GENAI, model__eos_token_id=7),
    "genai: another graph": fields(GENAI, model__decoder__filename="onnx/other.onnx"),
    "genai: a search setting": fields(GENAI, search__temperature=9.0),
    "genai: a provider": into(
        GENAI,
        lambda g: g["model"]["decoder"]["session_options"].update(provider_options=[{"x": {"library": "evil.so"}}]),
    ),
    "genai: a library": into(
        GENAI, lambda g: g["model"]["decoder"]["session_options"].update(custom_ops_library="x.so")
    ),
    "report: other costs": into(REPORT, lambda r: r["cost"]["pruned"].update(parameters=1)),
    "report: another sparsity": into(REPORT, lambda r: r.update(sparsity=0.9)),
    "report: a file less": into(REPORT, lambda r: r["files"].remove(GENERATION)),
    "report: no config changes": into(REPORT, lambda r: r.update(config_changes={})),
    "report: another digest of weights": into(REPORT, lambda r: r.update(weights_sha256="0" * 64)),
    "report: another digest of the plan": into(REPORT, lambda r: r.update(plan_sha256="0" * 64)),
    "manifest: a digest": into("mptk.json", lambda m: m["files"].update({CONFIG: "0" * 64})),
    "manifest: a file less": into("mptk.json", lambda m: m["files"].pop(GENERATION)),
    "manifest: a file more": into("mptk.json", lambda m: m["files"].update({"modules.json": "0" * 64})),
    "manifest: removed": delete("mptk.json"),
    "plan: another unit": into("plan.json", lambda p: _another_unit(p)),
    "proof: no inputs": delete("proof"),
    "proof: a file more": plant("proof/more.safetensors", b"\x08\0\0\0\0\0\0\0{}      "),
}


def _another_unit(plan: dict[str, Any]) -> None:
    family = plan["families"]["ffn"]
    for place, kept in family["keep"].items():
        numbers = [int(each.partition("-")[0]) for each in str(kept).split(",")]
        others = [str(n) for n in range(family["of"]) if n not in numbers]
        family["keep"][place] = str(kept).replace(str(kept).split(",")[0], others[-1], 1)
        return


ROWS = [Broken(KIND, name, damage) for name, damage in MODEL_FILES.items()]


def publish(kind: str, place: Path) -> Published:
    """A decoder of two layers with ONNX, int8 not among its graphs."""
    write_lab(place, quantize=())
    return prove_by_one_trace(place / "out")
