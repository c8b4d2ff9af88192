"""GGUF: files of llama.cpp, read as models, written from pruned folders, and proven against them.

A ``.gguf`` file stands for a model wherever one is named: ``mptk prune model.gguf …``. It is dequantised once, to a
checkpoint of floats in the cache folder; what needs only the config reads the file's metadata. ``mptk gguf DIR --out
FILE`` writes a file, in float or quantised. ``mptk verify FILE --like DIR`` proves it again: each field, each tensor
and, if llama.cpp is installed, its logits and how it reads text. docs/deploy.md tells more.

``loader``: a file as a model. ``reading``: its metadata, and the checkpoint that it becomes. ``architectures``: what
llama.cpp expects of each kind of model, as data, and the fields of the config. ``tokenizer``: the vocabulary.
``weights``: the tensors. ``folder``: all of these together, and the dense model's file, from which they may also come.
``check`` reads a file back, and derives what it must have apart from the code that writes it. ``prove``: the proof,
which also asks llama.cpp (``llama_cpp``).
"""

from typing import Literal

from mptk.protocols import Command, Feature

GgufType = Literal["auto", "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
"""Types of the matrices in a GGUF file. auto: as the folder has them."""

FEATURE = Feature(
    "gguf",
    "read, write and prove files of llama.cpp",
    page="docs/deploy.md",
    commands=[Command("gguf", "mptk.features.gguf.command", "Use the result", after="export")],
    options=["mptk.features.gguf.command"],
    loaders=["mptk.features.gguf.loader:GGUF"],
    provers=["mptk.features.gguf.prove:PROVER"],
)
