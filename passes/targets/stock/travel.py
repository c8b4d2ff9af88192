"""travel: which cuts of a model break programs other than transformers, by how its config holds the widths.

Such programs have code of their own for an architecture. They read most numbers of config.json and derive the others as
the class itself does by default. Two kinds of cuts break that:

1. The size of a head was ``hidden_size / num_attention_heads``, and no longer is. Its field says so, but many programs
   do not read it.
2. The class derives a number from others unless its field is set. The dense config leaves it open; the cut needs it.

``CONSUMERS`` are the programs that read a pruned folder, what was tried with them, and what they derive; docs/deploy.md
shows this table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedConfig

from mptk.compat.transformers import config_field, paired_configs
from passes.targets.stock.config import StockConfig
from passes.targets.stock.learn import Stock

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
    Consumer("lm-eval", "0.4.13", "the score of a task; a long test", section="lm-eval"),
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
        "greedy tokens are transformers' in float32 (a long test); int8 and int4 run by `file_name`, with other text. "
        "A cut of heads fails",
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


HEAD_DIM, HIDDEN_SIZE, HEADS = "head_dim", "hidden_size", "num_attention_heads"
"""Names that every config class with such a field has, by itself or through its ``attribute_map``."""


def breaks(stock: Stock, ladders: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Family → the programs that a cut of it alone breaks; families that travel everywhere have no entry.

    ``ladders``: each family's legal widths, the dense one last.
    """
    found = {}
    for name, widths in _cuts(stock, ladders):
        cut = stock.config(widths)
        if isinstance(cut, StockConfig) and (reasons := broken(cut, stock.dense)):
            found[name] = "; ".join(reasons)
    return found


def broken(cut: StockConfig, dense: PreTrainedConfig) -> list[str]:
    """The programs that do not read the config of a cut rightly, each named by what it derives."""
    reasons = [
        f"programs that derive {HEAD_DIM} from {HIDDEN_SIZE} and {HEADS}, as {deriving('head_dim')}"
        for before, after in paired_configs(dense, cut.config)
        if _derivable(before) and not _derivable(after)
    ]
    implied = [name for name, (old, _) in cut.changes.items() if old is None and name.rpartition(".")[2] != HEAD_DIM]
    if implied:
        fields = ", ".join(implied)
        reasons.append(f"programs that derive {fields}, which the dense config leaves open, as {deriving('open')}")
    return reasons


def _cuts(stock: Stock, ladders: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, dict[str, int]]]:
    """Each family that can be cut, with its widest cut and that of those that can only be cut with it."""
    for name, ladder in ladders.items():
        partners = next((group for group in stock.together if name in group), frozenset((name,)))
        sizes = {partner: ladders[partner][-1] for partner in partners}
        for width in reversed(ladder[:-1]):
            if all(size * width % ladder[-1] == 0 for size in sizes.values()):
                yield name, {partner: size * width // ladder[-1] for partner, size in sizes.items()}
                break


def _derivable(config: PreTrainedConfig) -> bool:
    """Whether the size of a head is what programs derive, or the config has no such field."""
    hidden, heads, size = (config_field(config, name) for name in (HIDDEN_SIZE, HEADS, HEAD_DIM))
    if not (isinstance(hidden, int) and isinstance(heads, int) and isinstance(size, int)):
        return True
    return hidden // heads == size
