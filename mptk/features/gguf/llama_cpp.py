"""llama_cpp: ask llama.cpp for log probabilities. The package ``xllamacpp``, which holds it, is optional.

llama.cpp ends the process on a file that it cannot read, so it runs in a process of its own. This file is also what
that process runs, so it imports nothing of mptk.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Tokens of the longest prompt and of the one after it. Few, since llama.cpp reserves the KV cache for all of them.
CONTEXT = 256
# Bytes of a file below which one thread is as fast as several, which wait for each other on a busy machine.
ONE_THREAD = 1 << 31


def has_llama_cpp() -> bool:
    """Whether llama.cpp can be imported."""
    return importlib.util.find_spec("xllamacpp") is not None


def log_probabilities(
    file: Path, prompts: Sequence[Sequence[int] | str], written: int, count: int
) -> list[dict[int, float]] | str:
    """llama.cpp's log probabilities of the ``count`` likeliest next tokens after each prompt; or why there are none.

    ``written``: a token of whole letters, which llama.cpp is made to write: it reports nothing for a token that ends
    within a letter. The log probabilities are the model's own all the same.
    """
    asked = json.dumps({"file": str(file), "prompts": prompts, "written": written, "count": count})
    # -P: without it, ``import accelerate`` or ``import torch`` would find the files beside this one.
    command = [sys.executable, "-P", __file__]
    ended = subprocess.run(command, input=asked, capture_output=True, text=True, check=False)
    if ended.returncode:
        lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else f"it ended with code {ended.returncode}"
    # llama.cpp may print, too, so the answer is the last line.
    found = json.loads(ended.stdout.splitlines()[-1])
    return [{int(token): number for token, number in each.items()} for each in found]


def _answer(asked: dict[str, Any]) -> list[dict[int, float]]:
    """What the process answers. llama.cpp is set up to compute as transformers does: in float32, without shortcuts."""
    import xllamacpp

    # One sequence, on the CPU, with nothing tried out beforehand.
    params = xllamacpp.CommonParams()
    params.model.path = asked["file"]
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = CONTEXT, 1, 0, 0
    threads = 1 if Path(asked["file"]).stat().st_size < ONE_THREAD else os.cpu_count() or 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.warmup = params.fit_params = False
    # A built-in template in place of the file's own, which is a program without bounds of time.
    params.chat_template, params.use_jinja = "chatml", False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    # One token, the likeliest, which the bias makes ``written``. Each prompt is computed anew.
    how = {"n_predict": 1, "max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "logprobs": asked["count"]}
    how |= {"logit_bias": [[asked["written"], 100.0]], "cache_prompt": False}
    answers = [server.handle_completions({"prompt": prompt, **how}) for prompt in asked["prompts"]]
    if refused := next((answer for answer in answers if "choices" not in answer), None):
        raise RuntimeError(str(refused.get("error", refused))[:200])
    tops = [answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] for answer in answers]
    return [{each["id"]: each["logprob"] for each in top} for top in tops]


if __name__ == "__main__":
    # On a line of its own, also if llama.cpp has left one unfinished.
    print("\n" + json.dumps(_answer(json.load(sys.stdin))))
