"""What a MODEL may be, and what never runs while loading one.

It reaches for mptk.io.models: a skeleton and opened weights are not public.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers.dynamic_module_utils
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.tiny_models import tiny_model
from mptk import testing
from mptk.compat.transformers import find_config_field
from mptk.errors import ChangedError, FileError, InputError
from mptk.io import Resident, check_hub_id, models
from mptk.testing import expect_error
from mptk.trust import trust_by_caller

IDS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def _cache(tmp_path, set_cache):
    set_cache(tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "toy"
    testing.save_model(testing.make_llama(), path)
    return path


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


class TestFolder:
    def test_weights_and_tokenizer(self, folder):
        loaded = models.load(str(folder))
        assert torch.equal(logits(loaded.model), logits(testing.make_llama()))
        assert loaded.tokenizer is not None
        assert loaded.tokenizer("brown fox").input_ids == testing.make_tokenizer()("brown fox").input_ids
        assert (loaded.source, loaded.path) == (str(folder), folder)
        assert not loaded.model.training
        assert models.load(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16
        assert models.build_skeleton(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16

    def test_without_tokenizer(self, tmp_path):
        testing.make_llama().save_pretrained(tmp_path / "bare")
        assert models.load(str(tmp_path / "bare")).tokenizer is None

    def test_skeleton_is_the_model_without_weights(self, folder):
        (folder / "model.safetensors").unlink()
        skeleton = models.build_skeleton(str(folder))
        assert {p.device.type for p in skeleton.parameters()} == {"meta"}
        assert {n: p.shape for n, p in skeleton.named_parameters()} == {
            n: p.shape for n, p in testing.make_llama().named_parameters()
        }
        assert skeleton.get_output_embeddings().weight is skeleton.get_input_embeddings().weight


class Touch:
    """Unpickling one makes the file ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


class TestNothingRuns:
    @pytest.mark.parametrize("named", [False, True])
    def test_pickles_are_refused(self, folder, tmp_path, named):
        """In place of the weights, and beside them, if the config names one."""
        name = "adapter_model.bin" if named else "pytorch_model.bin"
        (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
        if named:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
        else:
            (folder / "model.safetensors").unlink()
        with expect_error(FileError, name=folder):
            models.load(str(folder))
        assert not (tmp_path / "ran").exists()

    @pytest.mark.usefixtures("own_modules")
    def test_the_models_own_code(self, folder, tmp_path):
        config = json.loads((folder / "config.json").read_text())
        code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
        config |= {"model_type": "own", "auto_map": code, "architectures": ["OwnForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "own.py").write_text(
            f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
            "from transformers import LlamaConfig, LlamaForCausalLM\n"
            "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
            "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        )
        for refused in (models.load, models.build_skeleton):
            with expect_error(InputError, name="trust_remote_code"):
                refused(str(folder))
        assert not (tmp_path / "ran").exists()
        own = models.load(str(folder), trust_remote_code=True).model
        assert type(own).__name__ == "OwnForCausalLM"
        assert torch.equal(logits(own), logits(testing.make_llama()))
        assert type(models.build_skeleton(str(folder), trust=trust_by_caller(True))).__name__ == "OwnForCausalLM"


SMALL = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "num_hidden_layers": 1}


CLASSES: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "BertForMaskedLM": lambda: BertForMaskedLM(BertConfig(**SMALL, vocab_size=50)),
    "T5ForConditionalGeneration": lambda: T5ForConditionalGeneration(
        T5Config(d_model=24, d_kv=7, d_ff=40, num_layers=1, num_heads=3, vocab_size=50)
    ),
    "ViTForImageClassification": lambda: ViTForImageClassification(ViTConfig(**SMALL, image_size=12, patch_size=4)),
    "BertModel": lambda: transformers.BertModel(BertConfig(**SMALL, vocab_size=50)),
    "a text decoder that no auto class knows": lambda: tiny_model("causal-lm", "emu3").model,
}


@pytest.mark.parametrize("name", CLASSES)
def test_class_that_the_checkpoint_was_saved_from(name, tmp_path):
    model = CLASSES[name]()
    model.save_pretrained(tmp_path)
    assert type(models.load(str(tmp_path)).model) is type(model)
    assert type(models.build_skeleton(str(tmp_path))) is type(model)


def test_a_size_that_the_class_gives_may_say_that_there_is_no_limit(tmp_path):
    config = transformers.XLNetConfig(d_model=24, n_head=3, d_inner=40, n_layer=1, vocab_size=50)
    config.save_pretrained(tmp_path)
    assert config.max_position_embeddings == -1
    assert models.build_skeleton(str(tmp_path)).config.n_layer == 1


def test_a_rate_of_a_layer_is_no_number_of_layers(tmp_path):
    """Granite's ``layer_rope_theta`` is 10000.0 and more."""
    testing.make_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_rope_theta": 5e5}))
    assert models.load(str(tmp_path)).model
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_extra_layers": 9000}))
    with expect_error(FileError):
        models.load(str(tmp_path))


class TestHub:
    def test_id(self, tmp_path, inside):
        inside.bound("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        repo = tmp_path / "hub" / "models--someone--toy"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40)
        testing.make_llama().save_pretrained(repo / "snapshots" / ("0" * 40))
        check_hub_id("someone/toy")
        with expect_error(FileError, name="someone/else"):
            check_hub_id("someone/else")
        loaded = models.load("someone/toy")
        assert torch.equal(logits(loaded.model), logits(testing.make_llama()))
        assert loaded.source == "someone/toy"
        assert loaded.path == repo / "snapshots" / ("0" * 40)

    @pytest.mark.parametrize("name", ["someone/nothing", "no/such/folder", "smolm2-135m"])
    def test_nothing_of_that_name(self, name):
        with expect_error(FileError, name=name) as refused:
            models.load(name)
        assert "\n" not in str(refused.value)


def test_converted_weights_can_be_read_as_long_as_anything_has_them(tmp_path):
    """A mixture's experts are made of several weights of the file; a program may outlive its model."""
    model = testing.make_decoder("mixtral")
    model.save_pretrained(tmp_path)
    loaded = models.open_weights(str(tmp_path), Resident(0))
    name = next(name for name in loaded.weights if "experts" in name)
    some = loaded.weights.select_names({name: name})
    del loaded
    gc.collect()
    assert torch.equal(some[name], model.state_dict()[name])


@pytest.mark.parametrize("load", [models.load, partial(models.open_weights, resident=Resident(0))])
def test_a_weight_of_another_shape_than_the_configs_is_named(load, tmp_path):
    model = testing.make_decoder("llama")
    model.config.intermediate_size += 1
    model.save_pretrained(tmp_path)
    with expect_error(FileError) as refused:
        load(str(tmp_path))
    assert ".mlp." in refused.value.name


def read_peak() -> int:
    """Bytes that this process held at most since the last call."""
    lines = Path("/proc/self/status").read_text().splitlines()
    Path("/proc/self/clear_refs").write_text("5")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def test_opening_touches_no_page_of_a_weight_and_reading_gives_pages_back(tmp_path):
    config = LlamaConfig(
        hidden_size=512, intermediate_size=20_000, num_hidden_layers=6, vocab_size=128, num_attention_heads=4
    )
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    entries, end = {}, 0
    for name, tensor in state.items():
        size = 2 * tensor.numel()
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:  # its numbers are a hole in the file: zeros
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    models.build_skeleton(str(tmp_path))  # what is imported for it is no page of a weight
    read_peak()
    before = read_peak()
    weights = models.open_weights(str(tmp_path), Resident(0)).weights
    opened = read_peak() - before
    for name in weights:
        weights[name]
    assert end > 350e6
    assert opened < 60e6
    assert read_peak() - before < 200e6


@pytest.mark.parametrize("kind", ["buffers", "tied", "renamed", "converted", "split"])
def test_an_opened_model_has_the_weights_and_buffers_of_a_loaded_one(kind, tmp_path):
    torch.manual_seed(0)
    if kind == "buffers":
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 3}
        model: Any = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic"))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.uniform_(1, 2)
    elif kind == "split":  # queries, keys and values are one weight of the file
        model = tiny_model("causal-lm", "sarvam_moe").model
    else:
        model = testing.make_decoder({"tied": "gemma3", "renamed": "llama", "converted": "mixtral"}[kind])
    model.save_pretrained(tmp_path)
    if kind == "renamed":  # a checkpoint of the model without its head
        model.config.architectures, model = ["LlamaModel"], model.model
        shutil.rmtree(tmp_path)
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        save_file({f"model.{name}": tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    opened = models.open_weights(str(tmp_path), Resident(1 << 30))  # which keeps all that was read
    buffers = dict(opened.model.named_buffers())
    for name, tensor in model.state_dict().items():
        found = opened.weights[name] if name in opened.weights else buffers[name]
        assert torch.equal(found, tensor), name
    whole = opened.load_all().state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in model.state_dict().items())


def test_positions_that_a_class_makes_itself_are_in_no_file_and_there_when_opened(tmp_path):
    torch.manual_seed(0)
    layers = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = MarianConfig(vocab_size=31, d_model=12, max_position_embeddings=16, pad_token_id=30, **layers)
    model = MarianMTModel(config).eval()
    model.save_pretrained(tmp_path)
    assert "model.encoder.embed_positions.weight" not in load_file(tmp_path / "model.safetensors")
    opened = models.open_weights(str(tmp_path), Resident(0))
    assert opened.weights is not None
    found = opened.load_all().state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("mapping", "kind", "buffer"), [("masked-lm", "modernvbert", "rotary"), ("causal-lm", "falcon_h1", "mup_vector")]
)
def test_buffers_that_no_file_has_are_there_when_opened(tmp_path, mapping, kind, buffer):
    """The rotary frequencies of a model in a model; a vector that the model makes, and each of its layers holds."""
    model: Any = tiny_model(mapping, kind).model
    model.save_pretrained(tmp_path)
    opened = models.open_weights(str(tmp_path), Resident(0))
    found = dict(opened.model.named_buffers())
    assert any(buffer in name for name in found)
    assert all(torch.equal(found[name], held) for name, held in model.named_buffers())


def test_a_size_that_differs_by_layer_is_read_of_each_layer(tmp_path):
    """dots3.note has more heads in layers of a window. transformers refuses to read the number of the whole model."""
    kinds = ["indexed_attention", "sliding_attention"]
    config = transformers.Dots3NoteTextConfig(num_hidden_layers=2, layer_types=kinds, n_routed_experts=8)
    config.architectures = ["Dots3NoteForCausalLM"]
    config.save_pretrained(tmp_path)
    whole, window = find_config_field(models.build_skeleton(str(tmp_path)).config, "num_attention_heads")
    assert (whole, window) == (128, 64)


def test_a_file_that_is_cut_short_is_an_error_and_no_end_of_the_process(tmp_path):
    """Its weights are mapped: to touch what is no longer there is a SIGBUS."""
    testing.make_llama().save_pretrained(tmp_path)
    weights = models.open_weights(str(tmp_path), Resident(1 << 30)).weights
    name = "model.embed_tokens.weight"
    assert weights[name].isfinite().all()
    os.truncate(tmp_path / "model.safetensors", 1000)
    with expect_error(ChangedError, name=tmp_path / "model.safetensors"):
        weights[name]
