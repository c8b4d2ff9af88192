"""Toy sizes by role: what the words of a config field's name say, and the sizes and caps of each role."""

from __future__ import annotations

import re
from typing import Any

VOCAB, POSITIONS, WINDOW, FIRST_PLAIN_TOKEN = 131, 64, 4, 20
IMAGE, STAGED_IMAGE, IMAGE_TOKENS, LABELS = 32, 128, 4, 13
POOLS: dict[str, tuple[int, ...]] = {
    "hidden": (96, 72, 120, 144, 168, 48, 192),
    "ffn": (112, 40, 56, 88, 104, 136, 80, 64, 152),
    "width": (80, 64, 40, 56, 88, 104, 128, 136, 152, 160, 176, 184, 200),
    "rank": (20, 28, 36, 44),
    "heads": (6, 12, 4),
    "kv_heads": (2, 3, 1),
    "head_dim": (24, 32, 16, 20, 28, 12, 8),
    "experts": (10, 8, 12),
    "top_k": (3, 2),
    "window": (WINDOW, 5, 3),
}
CAPS = {
    "groups": 2,
    "topk_group": 1,
    "ssm_groups": 2,
    "first": 1,
    "period": 2,
    "rotary": 8,
    "positions": POSITIONS,
    "patch": 8,
    "vocab": VOCAB,
    "codebook": 32,
    "normed": 32,
    "image_tokens": IMAGE_TOKENS,
    "rate": 2,
    "frames": 4,
    "queries": 8,
}
# Words of field names, tried in this order; the first that matches gives the role.
ROLES: tuple[tuple[str, str], ...] = (
    (
        "keep",
        r"dropout|pdrop|_prob$|initializer|dtype|ignore_index|chunk_size_feed|tokenizer_chunk|sampling|_tp$|seed|alpha|beta",
    ),
    (
        "keep",
        r"kernel|stride|conv1d_width|d_conv|expan|mult|ratio|dilation|padding|hop_length|time_step|type_vocab|unit_size",
    ),
    ("keep", r"^(num|in|out|audio)_channels$|^channels$"),
    ("frames", r"frames_per_clip"),
    ("queries", r"^num_queries$"),
    ("image_tokens", r"tokens_per_image|image_seq_length|resampler_n_latents"),
    ("rate", r"compress_rate"),
    ("token", r"_token_ids?$|_token_index$|^(unk|mask|pad|eos|bos)_index$"),
    ("codebook", r"codebook_size|^num_embeddings$"),
    ("normed", r"^base_channels$"),
    ("vocab", r"vocab"),
    ("kv_heads", r"(kv|key_value)_(n_)?heads|query_groups"),
    ("heads", r"heads$|n_head$|heads_per_layer$"),
    ("rotary", r"^rotary_dim$"),
    ("head_dim", r"head_?dim$|^d_kv$|dim_head|d_head$|head_size$|kv_channels"),
    ("groups", r"^n_group$|num_expert_group$"),
    ("ssm_groups", r"(n_?|num_)groups$"),
    ("topk_group", r"topk_group"),
    ("top_k", r"experts_per_tok|top_?k(_experts)?$|moe_k$"),
    ("shared", r"shared_experts$"),
    ("experts", r"experts$|expert_num$"),
    ("first", r"first_k|num_dense_layers|start_index|kv_shared_layers|max_window_layers|offset"),
    ("period", r"interval|period|every_n|sparse_step|pattern$|layer_group_size|frequency"),
    ("layers", r"(^|_)layers?$|^depths?$|(num|attn)_blocks$|block_repeats$|per_block$"),
    ("positions", r"position|max_seq|n_ctx|max_length|context_length|max_len|max_pos_emb"),
    ("window", r"window|^(mamba_|attention_)?chunk_size$|attn_chunk_length|local_attention|index_topk|extent"),
    ("rank", r"rank"),
    ("image", r"image_size"),
    ("patch", r"patch_sizes?$"),
    ("hidden", r"^(hidden_size|d_model|n_embd|emb_dim|dim|hidden_sizes|embed_dim|embed_dims|d_latents)$"),
    ("ffn", r"intermediate|ffn|feed_forward|d_ff$|dff$|n_inner|mlp_dim|d_inner|ff_dim"),
    ("width", r"size|dim|width|filters|d_state|d_ssm|hidden|channels|latents|bottleneck_features"),
)
# The layers whose states a backbone gives.
OUTPUTS = "out_indices"
BACKBONE = "backbone_config"
# The widths of the layers around a backbone that cuts masks out of its states.
AROUND = "^(hidden|conv|mask)_dim$|feature_size$"
# The widths of states that others give.
TAKEN = "in_channels$|feat_dim$"
# The widths of the features that a tower gives.
FEATURES = ("out_hidden_size", "projection_dim")
# Factors on all widths or depths of a convolutional network.
MULTIPLIER, LEAST_MULTIPLIER = "^(width|depth)_coefficient|depth_multiplier", 0.25
# Sizes that a model may need although its configuration class defaults them to None.
FILLED = ("experts", "top_k", "head_dim", "ffn", "shared", "kv_heads", "vocab", "token")
# Values for fields of other types, by field name: the smallest network timm has, a language of the default list, and
# the sizes to which an image is cut into parts.
NAMED = {
    "architecture": "test_resnet",
    "backbone": "test_resnet",
    "default_language": "en_XX",
    "projector_patch_to_query_dict": {(IMAGE // 8) ** 2: IMAGE_TOKENS},
    "projector_scale_factors": [1.0],
    "image_grid_pinpoints": [[IMAGE, 2 * IMAGE], [2 * IMAGE, 2 * IMAGE]],
}
# Kernel, stride and padding of convolutions of 3, 5 and 7 rows, columns or both, for the shapes of texts.
_SIDES = {"shortratio": 3, "midratio": 5, "longratio": 7}
_SHAPES = {
    "vertical_long_to_small_conv": (1, 0),
    "horizontal_small_to_long_conv": (0, 1),
    "symmetric_conv_long": (1, 1),
}
_CONVOLUTIONS = {
    f"{shape}_{name}": [
        [1 + down * (side - 1), 1 + across * (side - 1)],
        [1, 1],
        [down * side // 2, across * side // 2],
    ]
    for shape, (down, across) in _SHAPES.items()
    for name, side in _SIDES.items()
}
# The same for fields that default to None and that the model needs.
NAMED_FILLED = {
    "clip_qkv": 4.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "class_thresholds": [0.5] * LABELS,
    "class_order": [*range(LABELS)],
    "kernel_list": [3, 2, 2],
    "scale_factor_list": [1, 2, 4, 8],
    "intraclass_block_config": {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0], **_CONVOLUTIONS},
}
# The last resort: fields of one model type, each with the reason why no rule can find them.
MODEL_HINTS: dict[str, dict[str, Any]] = {
    # LSH attention hashes with fresh random rotations at each call: the output is no function of the input.
    "reformer": {"attn_layers": ["local", "local"]},
    # The default width of its images' features is of another size of text model than the default text model.
    "qwen2_vl_vision": {"hidden_size": POOLS["hidden"][0]},
    # Read from the config with a default beyond a toy vocabulary, but no field of its class.
    "shieldgemma2": {"yes_token_index": 21, "no_token_index": 22},
    # Its default reads lines of text. The detectors around it take four stages, each half as large as the one before:
    # kernel, channels in and out, stride, squeeze and excitation.
    "pp_lcnet_v4": {
        "block_configs": [
            [[3, 16, 24, 1, True]],
            [[3, 24, 40, 2, False]],
            [[3, 40, 56, 2, True]],
            [[3, 56, 72, 2, False]],
        ],
        "stem_channels": [3, 12, 16],
        "out_features": [f"stage{i}" for i in range(1, 5)],
    },
    # Its class for segmentation takes the states of four layers, the default config gives one.
    "beit": {"num_hidden_layers": 4, OUTPUTS: [1, 2, 3, 4]},
    # The indexer of the other layer type loops over nonzero() for every token, which torch.export refuses.
    "qwen4_exp_text": {"layer_types": ["linear_attention", "linear_attention"], "num_hidden_layers": 2},
}


def role(name: str) -> str:
    """The role of a config field, from the words of its name; "other" where no word tells."""
    return next((kind for kind, pattern in ROLES if re.search(pattern, name)), "other")
