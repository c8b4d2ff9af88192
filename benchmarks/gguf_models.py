"""gguf_models: tiny random models of each architecture that mptk writes as GGUF, and llama.cpp's log probabilities.

    python -m benchmarks.gguf_models [--json FILE] [--only qwen3,gpt2]

Each model is pruned, written in float32, q8_0 and q4_0, and run in llama.cpp (``pip install xllamacpp``) on 24 tokens.
Its log probabilities of the whole vocabulary are compared with transformers' of the pruned folder, in float32. The last
lines are the table of benchmarks/programs.md.
"""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import mptk
from benchmarks.common import result_header, write_result
from mptk.features.gguf import api
from mptk.features.gguf.architectures import ARCHITECTURES

HIDDEN, HEADS, VOCAB, LAYERS = 64, 4, 300, 3
IDS = torch.randint(3, VOCAB, (24,), generator=torch.Generator().manual_seed(1))
ASCII = 40
"""A token that llama.cpp is made to write, since it says nothing of half a letter. It reports the model's own numbers."""
TEXT = "the quick brown fox jumps over the lazy dog while seven wizards quietly mix pale blue jars of honey\n" * 4
PLAIN: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
ROUTED |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
ERNIE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 2}
ERNIE |= {"moe_layer_start_index": 1}
GPT = {"n_embd": HIDDEN, "n_inner": 128, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128, "vocab_size": VOCAB}
SCALES = {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}


def _sliding(layers: int, period: int) -> dict[str, Any]:
    """Windows shorter than the text."""
    kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    return {"num_hidden_layers": layers, "layer_types": kinds, "sliding_window": 8}


def _rope(kind: str, **numbers: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **numbers}}


LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LONGROPE = _rope(
    "longrope",
    short_factor=[1 + i / 10 for i in range(8)],
    long_factor=[2 + i / 10 for i in range(8)],
    original_max_position_embeddings=256,
)
MINISTRAL = _rope(
    "yarn", factor=4.0, original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1
)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", WIDE),
    "llama, scaled rope": ("LlamaConfig", {**GROUPED, **LLAMA3}),
    "llama, yarn": ("LlamaConfig", {**WIDE, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)}),
    "llama, linear rope": ("LlamaConfig", {**WIDE, **_rope("linear", factor=4.0)}),
    "llama, biases": ("LlamaConfig", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {**WIDE, "sliding_window": None}),
    "mixtral": ("MixtralConfig", {**GROUPED, **LOCAL_EXPERTS}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen2_moe": ("Qwen2MoeConfig", {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3": ("Qwen3Config", WIDE),
    "qwen3_moe": ("Qwen3MoeConfig", {**WIDE, **EXPERTS, "norm_topk_prob": True}),
    "gemma": ("GemmaConfig", WIDE),
    "gemma2": ("Gemma2Config", {**WIDE, **_sliding(4, 2), "query_pre_attn_scalar": 32}),
    "gemma3_text": ("Gemma3TextConfig", {**WIDE, **_sliding(7, 6), "query_pre_attn_scalar": 32}),
    "phi": ("PhiConfig", {**PLAIN, "num_key_value_heads": HEADS}),
    "phi3": ("Phi3Config", GROUPED),
    "phi3, long rope": (
        "Phi3Config",
        {**GROUPED, **LONGROPE, "max_position_embeddings": 512, "original_max_position_embeddings": 256},
    ),
    "gpt2": ("GPT2Config", GPT),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT),
    "gpt_neox": ("GPTNeoXConfig", {**PLAIN, "rotary_pct": 0.5}),
    "starcoder2": ("Starcoder2Config", {**GROUPED, "sliding_window": None}),
    "stablelm": ("StableLmConfig", GROUPED),
    "olmo": ("OlmoConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "olmoe": ("OlmoeConfig", {**PLAIN, "num_key_value_heads": HEADS, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite": ("GraniteConfig", {**WIDE, **SCALES}),
    "cohere": ("CohereConfig", {**GROUPED, "logit_scale": 0.5}),
    "cohere2": ("Cohere2Config", {**GROUPED, **_sliding(5, 4), "head_dim": 16, "logit_scale": 0.5}),
    "smollm3": ("SmolLM3Config", {**WIDE, "num_hidden_layers": 5}),
    "arcee": ("ArceeConfig", WIDE),
    "nemotron": ("NemotronConfig", {**GROUPED, "head_dim": 16}),
    "seed_oss": ("SeedOssConfig", WIDE),
    "ernie4_5": ("Ernie4_5Config", WIDE),
    "glm4": ("Glm4Config", WIDE),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", WIDE),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", {**WIDE, "num_experts": 4, "moe_topk": 2}),
    "internlm3": ("InternLM3Config", WIDE),
    "iquestcoder": ("IQuestCoderConfig", WIDE),
    "cwm": ("CwmConfig", WIDE),
    "ministral3": ("Ministral3Config", {**WIDE, **MINISTRAL}),
    "exaone": ("ExaoneConfig", GROUPED),
    "exaone4": ("Exaone4Config", {**GROUPED, "sliding_window": None, "layer_types": ["full_attention"] * LAYERS}),
    "jais2": ("Jais2Config", GROUPED),
    "glm": ("GlmConfig", {**GROUPED, "head_dim": 16}),
    "olmo3": ("Olmo3Config", {**GROUPED, **_sliding(5, 4)}),
    "falcon": ("FalconConfig", {**PLAIN, "ffn_hidden_size": 128}),
    "glm4_moe": ("Glm4MoeConfig", {**WIDE, **ROUTED, "use_qk_norm": True, "routed_scaling_factor": 1.5}),
    "dots1": ("Dots1Config", {**PLAIN, "num_key_value_heads": HEADS, "head_dim": 32, **ROUTED}),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", {**WIDE, **ERNIE}),
    "granitemoe": ("GraniteMoeConfig", {**GROUPED, **SCALES, **LOCAL_EXPERTS}),
    "granitemoeshared": ("GraniteMoeSharedConfig", {**GROUPED, **LOCAL_EXPERTS, "shared_intermediate_size": 64}),
}
"""Name → config class and its fields. The part before a comma is the ``model_type``."""


def model(name: str) -> PreTrainedModel:
    """The model in evaluation mode, its weights far from their small initial values (norms and biases, too)."""
    kind, fields = MODELS[name]
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**fields)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    for name, bias in made.named_buffers():
        if name.endswith("correction_bias"):
            torch.nn.init.normal_(bias, std=0.1)
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of ``VOCAB`` tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


def save(name: str, folder: Path) -> Path:
    """The checkpoint folder of a model."""
    model(name).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def llama_cpp(file: Path, prompt: list[int] | str) -> torch.Tensor:
    """llama.cpp's log probabilities of the next token [VOCAB], with a cache in float32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.verbosity = 64, 1, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    asked = {"prompt": prompt, "n_predict": 1, "max_tokens": 1, "temperature": 0.0, "logprobs": VOCAB}
    found = xllamacpp.Server(params).handle_completions(asked | {"logit_bias": [[ASCII, 100.0]]})
    said = {each["id"]: each["logprob"] for each in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    return torch.tensor([said[number] for number in range(VOCAB)])


def expected(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """transformers' log probabilities of the next token [VOCAB]."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = loaded(ids[None]).logits[0, -1]
    return logits.log_softmax(-1)


def row(name: str, place: Path) -> dict[str, Any]:
    """Prune, write and run a model."""
    square = ARCHITECTURES[name.partition(",")[0]].square
    settings = mptk.Settings(
        method="magnitude",
        sparsity=0.25,
        data="random",
        samples=1,
        length=24,
        eval_windows=1,
        align=32,
        tolerance=0.2,
        portable=square,
        onnx=False,
    )
    pruned = mptk.prune(str(save(name, place / "dense")), place / "out", settings)
    wanted, found = expected(place / "out"), {}
    for kind in ("f32", "q8_0", "q4_0"):
        made = api.gguf(place / "out", place / f"{kind}.gguf", type=kind)
        found[kind] = float(f"{(llama_cpp(place / f'{kind}.gguf', IDS.tolist()) - wanted).abs().max():.1e}")
    cut = sorted(family for family, choice in pruned.plan.families.items() if choice.width < choice.of)
    return {"model": name, "architecture": made.weights.architecture, "cut": cut, "difference": found}


def main(
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
    only: Annotated[str, typer.Option(help="names of models, separated by commas")] = "",
) -> None:
    torch.set_num_threads(1)
    header = {**result_header(), "xllamacpp": version("xllamacpp"), "tokens": len(IDS), "vocabulary": VOCAB}
    rows = []
    for name in only.split(",") if only else MODELS:
        with tempfile.TemporaryDirectory() as temporary:
            rows.append(row(name, Path(temporary)))
        print(rows[-1], flush=True)
        if json_file is not None:
            write_result(json_file, header, rows)
    print("| model | in the file | cut | f32 | q8_0 | q4_0 |", "|---|---|---|---|---|---|", sep="\n")
    for each in rows:
        named = (each["model"], each["architecture"], ", ".join(each["cut"]), *each["difference"].values())
        print(f"| {' | '.join(map(str, named))} |")


if __name__ == "__main__":
    typer.run(main)
