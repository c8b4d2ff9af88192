"""Prune models that are in memory: a transformers model with texts, and a plain module with example inputs.

    python examples/prune_in_python.py

Both models are tiny and random, and are made here, so that this needs no network and takes seconds. With a model of
your own, replace ``tiny_model()``: ``AutoModelForCausalLM.from_pretrained(…)``, or a hub id, or a folder.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mptk

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "mix",
    "pale",
    "blue",
    "jars",
    "of",
    "honey",
]
TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 4


def tiny_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama of two layers, and a tokenizer that knows a few words."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS) + 2, max_position_embeddings=64, **sizes))
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "</s>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return model, PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Net(nn.Module):
    """Any module: its forward takes and gives tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def transformers_model() -> None:
    """Prune, train, measure and save a transformers model."""
    model, tokenizer = tiny_model()
    pruned = mptk.prune(
        model,
        sparsity=0.3,
        tolerance=0.05,  # a tiny model has few widths
        align=8,
        method="wanda",
        data=TEXTS,
        length=16,
        tokenizer=tokenizer,
    )
    print(pruned)  # nothing was written
    print("perplexity", {name: pruned.report.quality[name] for name in ("dense", "pruned")})

    small = pruned.model.train()  # a stock LlamaForCausalLM
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    small(input_ids=ids, labels=ids).loss.backward()

    better = mptk.recover(pruned, data=TEXTS, length=16, steps=4, batch=4, micro=4, rank=4)
    print("after recovery", mptk.evaluate(better, TEXTS, length=16)["model"])


def any_module() -> None:
    """Prune a plain module. A DataLoader gives its calibration data."""
    net = Net().eval()
    batches = [torch.randn(8, 16) for _ in range(4)]
    pruned = mptk.prune(net, sparsity=0.4, tolerance=0.05, align=8, example_inputs=batches[0], data=batches)
    small = pruned.model  # the same names, fewer channels
    print(f"{net.blocks[0].up.weight.shape[0]} -> {small.blocks[0].up.weight.shape[0]} channels")
    print("distance of the outputs", pruned.report.quality["pruned"])

    optimizer = torch.optim.Adam(small.parameters(), lr=1e-3)
    for batch in batches:
        loss = (small(batch) - net(batch).detach()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    transformers_model()
    any_module()
