"""consumers: the programs that read a pruned folder, what was tried with them, and which numbers they derive.

``docs/deploy.md`` shows this table; ``travel.py`` names these programs where a cut breaks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Derived = Literal["head_dim", "open"]
"""What a program derives instead of reading it from config.json: the size of a head, from the hidden size and the
number of heads; or a number that the dense model's config leaves open, as the class itself derives it."""


@dataclass(frozen=True)
class Consumer:
    """A program. ``version``: the one tried; empty if none was. ``result``: what was seen, as docs/deploy.md says it.

    ``section``: its section there. ``derives``: what it derives → for which models, in words; empty: for all.
    """

    name: str
    version: str
    result: str
    section: str = ""
    derives: Mapping[Derived, str] = field(default_factory=dict)

    def said(self, derived: Derived) -> str:
        """The program, with the models for which it derives this."""
        return f"{self.name} ({models})" if (models := self.derives[derived]) else self.name


CONSUMERS = (
    Consumer(
        "transformers", "5.24.0, 4.57.6", "greedy text, the same in both", section="transformers-trainer-and-peft"
    ),
    Consumer("Trainer and peft", "5.24.0, 0.21.2", "LoRA trained, merged, saved, loaded; a long test"),
    Consumer(
        "sentence-transformers",
        "6.2.0",
        "MiniLM at 30 %: embeddings are transformers' to the last digit; a long test",
        section="sentence-transformers",
    ),
    Consumer("lm-eval", "0.4.13", "log-likelihoods; a whole task was not tried here", section="lm-eval"),
    Consumer("ONNX Runtime", "1.32.0", "part of the proof", section="onnx-runtime"),
    Consumer(
        "onnxruntime-genai",
        "0.18.0",
        "greedy tokens are transformers', also in a second turn; a test",
        section="onnxruntime-genai",
    ),
    Consumer(
        "transformers.js in Node",
        "4.3.1 (Node 20)",
        "greedy tokens are transformers' in float32, and `mptk generate`'s in int8, int4 and fp16. Chats, too; a test",
        section="transformersjs",
    ),
    Consumer(
        "transformers.js in a browser",
        "4.3.1 (Chromium 156)",
        "a chat in float32: the text is transformers'; a test",
        section="transformersjs",
    ),
    Consumer(
        "optimum-onnx",
        "0.1.0",
        "greedy tokens are transformers' in float32; int8 and int4 run by `file_name`, with other text. A cut of heads "
        "fails",
        section="optimum",
        derives={"head_dim": ""},
    ),
    Consumer(
        "OpenVINO",
        "2026.4.1",
        "float32 logits within 3e-6 of ONNX Runtime's; int8 and int4: the same next tokens on one prompt; a long test",
        section="openvino",
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
        "GGUF by `mptk gguf`, of 30 kinds of models: log probabilities of the pruned folder; a test. By the converter "
        "of llama-cpp-python 0.3.36, in q8_0: text",
        section="llamacpp",
        derives={"open": "its converter takes 4 · n_embd for n_inner"},
    ),
    Consumer(
        "vLLM", "", "read in the source of 0.33.0", section="vllm", derives={"head_dim": "for Qwen2, not for Llama"}
    ),
    Consumer(
        "mlx-lm, a width for each layer",
        "0.32.2, mlx-cpu 0.32.4",
        "logits within 8.4e-05 of ONNX Runtime's, relative to the largest",
        section="a-width-for-each-layer",
    ),
    Consumer(
        "vLLM and SGLang, a width for each layer",
        "0.33.0, 0.5.23",
        "only their model files, on plain layers in place of their kernels: logits within 2.8e-05, relative to the "
        "largest",
    ),
    Consumer("TensorRT-LLM, a width for each layer", "", "read in its source"),
)


def deriving(derived: Derived) -> str:
    """The programs that derive this, in words."""
    return ", ".join(each.said(derived) for each in CONSUMERS if derived in each.derives)
