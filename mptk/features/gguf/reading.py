"""reading: what a GGUF file says about its model, and the checkpoint of floats that it becomes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import GGUFReader
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from mptk.compat.transformers import forget_source
from mptk.io.checkpoint import save_checkpoint
from mptk.io.models import explain_load_errors, load_pretrained
from mptk.publish.licence import write_stub
from mptk.trust import NO_CODE


def read_gguf_config(gguf: Path) -> PreTrainedConfig:
    """The config in a GGUF file's metadata, without the model's title and with rounded numbers."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    forget_source(config)
    # GGUF stores float32: an epsilon of 1e-05 is read as 9.999999747378752e-06. The shortest text of the float32 number
    # is 1e-05 again.
    for name, value in vars(config).items():
        if isinstance(value, float):
            setattr(config, name, float(str(np.float32(value))))
    return config


def write_float_checkpoint(gguf: Path, folder: Path) -> None:
    """Dequantise ``gguf`` to float32 and save it in ``folder`` as a checkpoint.

    Raises:
        MptkError: transformers cannot read the file.
    """
    with explain_load_errors(str(gguf)):
        config = read_gguf_config(gguf)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, config=config)
    options = {"gguf_file": gguf.name, **dequantize_gguf()}
    module = load_pretrained(gguf.parent, str(gguf), config, NO_CODE, dtype=torch.float32, **options)
    # A tokenizer that is read from GGUF knows no longest text, so it gets the model's.
    if isinstance(length := getattr(config, "max_position_embeddings", None), int):
        tokenizer.model_max_length = length
    save_checkpoint(module, tokenizer, folder)
    if said := _read_licence(gguf):
        write_stub(folder, said)


def dequantize_gguf() -> dict[str, object]:
    """Options that make ``from_pretrained`` read a GGUF file into plain floats."""
    # Releases that can compute on GGUF blocks keep them by default. Earlier ones lack the class, and always dequantise.
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _read_licence(gguf: Path) -> str:
    """The licence in a GGUF file's metadata; empty if it names none."""
    with explain_load_errors(str(gguf)):
        field = GGUFReader(gguf).get_field("general.license")
        return "" if field is None else str(field.contents())
