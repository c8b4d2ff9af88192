"""What is written, transformers 5 reads back as it was, and transformers 4 finds its own spellings."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from benchmarks.tiny_models import tiny_model
from mptk import testing
from mptk.io import copy_processors, make_portable_config, save_tokenizer
from mptk.io.checkpoint import copy_beside, save_checkpoint

SIZES = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 97, "num_hidden_layers": 2}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 64}
CASES: list[tuple[PreTrainedConfig, dict[str, Any]]] = [
    (LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e5}), {"rope_theta": 1e5}),
    (
        LlamaConfig(**SIZES, rope_parameters=SCALED | {"rope_theta": 5e5}, max_position_embeddings=512),
        {"rope_theta": 5e5, "rope_scaling": SCALED},
    ),
    (
        GPTNeoXConfig(**SIZES, rotary_pct=0.5, rope_parameters={"rope_theta": 3e4, "rope_type": "default"}),
        {"rotary_emb_base": 3e4, "rotary_pct": 0.5},
    ),
    (
        Gemma3TextConfig(
            **SIZES,
            num_key_value_heads=1,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
        ),
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4},
    ),
]


@pytest.mark.parametrize(("config", "old"), CASES, ids=["plain", "scaled", "partial", "two bases"])
def test_rotary_settings_in_both_spellings(config, old, tmp_path):
    model = AutoModelForCausalLM.from_config(config).eval()
    save_checkpoint(model, None, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written[key] for key in old} == old
    assert make_portable_config(json.loads(model.config.to_json_string())) == written
    # Read again it is the same model: the old spellings do not get in the new ones' way.
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
    ids = torch.arange(5, 80)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_config_without_rotary_embedding_is_as_it_was():
    config = LlamaConfig(**SIZES)
    config.rope_parameters = None
    assert not {"rope_theta", "rope_scaling"} & make_portable_config(json.loads(config.to_json_string())).keys()


def test_tokenizer(tmp_path):
    tokenizer = testing.make_tokenizer(begin=True)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    save_tokenizer(tokenizer, tmp_path / "once")
    save_tokenizer(AutoTokenizer.from_pretrained(tmp_path / "once"), tmp_path / "twice")
    written = json.loads((tmp_path / "twice" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "extra_special_tokens"} & written.keys()
    assert written["add_bos_token"] is True, "without it pipelines of transformers.js drop <s>"
    again = AutoTokenizer.from_pretrained(tmp_path / "twice")
    text = "brown <tool> fox</s>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.decode(again(text).input_ids, skip_special_tokens=True) == "brown  fox"
    assert again.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<s>", "</s>", "<pad>")


NAMED = {"default": "{{ a }}", "rag": "{{ b }}"}


@pytest.mark.parametrize(
    ("template", "written"),
    [("{{ a }}", "{{ a }}"), (NAMED, [{"name": n, "template": t} for n, t in NAMED.items()])],
)
def test_both_places_of_a_chat_template_say_the_same(template, written, tmp_path):
    tokenizer = testing.make_tokenizer()
    tokenizer.chat_template = template
    save_tokenizer(tokenizer, tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    assert json.loads(settings.read_text())["chat_template"] == written
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == template
    for file in tmp_path.rglob("*.jinja"):  # a program that does not know these files
        file.unlink()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == template


def test_an_unknown_token_is_no_begin(tmp_path):
    tokenizer = testing.make_word_tokenizer()  # its unknown token is the begin, and no text begins with it otherwise
    save_tokenizer(tokenizer, tmp_path)
    assert "add_bos_token" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_only_nested_configs_are_given_older_spellings():
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    content = {"text_config": rope, "notes": rope, "kind_config": "plain"}
    assert make_portable_config(content) == {**content, "text_config": {**rope, "rope_theta": 5.0}}


def test_a_rotary_type_that_has_no_older_spelling_is_read_as_it_was(tmp_path):
    """Gemma 4's full attention; its class takes the older spelling for a base that is missing."""
    config = tiny_model("causal-lm", "gemma4_text").model.config
    assert config.rope_parameters["full_attention"]["rope_type"] == "proportional"
    (tmp_path / "config.json").write_text(json.dumps(make_portable_config(json.loads(config.to_json_string()))))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


@pytest.mark.parametrize("same_features", [True, False])
def test_what_pools_features_is_copied_if_their_number_stays(same_features, tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    for name in ("preprocessor_config.json", "1_Pooling/config.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text('{"word_embedding_dimension": 48}')
    copy_processors(source, folder, same_features=same_features)
    assert (folder / "preprocessor_config.json").is_file()
    assert (folder / "1_Pooling" / "config.json").is_file() == same_features


def test_what_stands_beside_weights_is_copied_with_them(tmp_path):
    """A module that was loaded from a folder is written whole: as it is, its features have as many channels."""
    names = ("preprocessor_config.json", "modules.json", "1_Pooling/config.json", "modeling_mine.py")
    source, folder = tmp_path / "source", tmp_path / "copy"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    folder.mkdir()
    copy_beside(source, folder)
    assert [(folder / name).read_text() for name in names] == list(names)
