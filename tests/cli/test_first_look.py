"""Mistakes that are found before torch is imported, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import mptk
from mptk.config import with_keywords
from mptk.errors import FileError, InputError, KeywordError
from mptk.io import check_folder_named, check_model_name, check_sources
from mptk.protocols import make_run_folder
from mptk.testing import expect_error

TYPE = """
import json, sys
from mptk.cli.main import main
done = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["mptk", *words.split()]
    try:
        main()
    except SystemExit as stopped:
        done[words] = [stopped.code, [name for name in ("torch", "transformers") if name in sys.modules]]
print(json.dumps(done))
"""
FIRST = """
import importlib.abc, json, sys
class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name == "torch":
            print("torch", file=sys.stderr, flush=True)
            raise ImportError("torch is refused")
sys.meta_path.insert(0, Refused())
from mptk.cli.main import main
for words in json.loads(sys.argv[1]):
    print("next", file=sys.stderr, flush=True)
    sys.argv = ["mptk", *words]
    try:
        main()
    except SystemExit:
        pass
"""
MISTAKES = (
    "prune smollm2-135m --sparsity 0.3",
    "prune smollm2-135m --config recipe.yaml --out x",
    "prune smolm2-135m --sparsity 0.3 --out x",
    "prune ./no/such --sparsity 0.3 --out x",
    "prune smollm2-135m --method wandas --out x",
    "prune smollm2-135m --data nowhere.txt --out x",
    "prune smollm2-135m --data empty.txt --out x",
    "prune smollm2-135m --data binary.txt --out x",
    "prune smollm2-135m --sparsity 30 --out x",
    "prune smollm2-135m --sparsity 0.3 --method wanda --masks hard --out x",
    "prune smollm2-135m --sparsity 0.3 --method wanda --lr 1e-3 --out x",
    "prune smollm2-135m --width fnn=64 --out x",
    "prune smollm2-135m --sparsity 0.3 --keep kv_grups --out x",
    "prune smollm2-135m --ladder 0.2,x --out x",
    "advise ./no/such --data some.txt",
    "recover dense --steps 1 --out x",
    "prune deep --minutes 1 --out x",
    "prune deep.gguf --minutes 1 --out x",
    "recover smollm2-135m --steps 1 --out x",
    "report ./no/such",
    "report dense",
    "verify dense",
    "generate smollm2-135m Hello",
    "bench missing.onnx",
    "gguf smollm2-135m --out x.gguf",
    "export missing.gguf --out x",
    "export dense --out full",
    "prune empty --out x",
    "analyze damaged",
    "prune damaged.gguf --out x",
    "prune dense --data some.txt --out full",
    "recover pruned --steps 1 --out full",
    "prune dense --data empty --out x",
    "prune dense --data damaged.jsonl --out x",
    "prune decoder --data some.txt --out x",
    "advise decoder --data some.txt",
    "eval decoder --data some.txt",
    "report empty",
    "prune dense --sparsity 0.3 --max-decode-ms 9 --out x",
    "prune dense --sparsity 0.3 --ladder 0.2,0.3 --out x",
    "prune dense --sparsity 0.3 --plan plan.json --out x",
    "prune dense --quantize auto --data some.txt --out x",
    "prune dense --data some.txt --out stopped",
    "recover pruned --steps 1 --out stopped",
    "prune dense --engines onnxruntime --no-onnx --out x",
    "prune classless --out x",
    "prune nobody/nothing --out x",
    "bench nobody/nothing",
    "generate empty Hello",
    "analyze smollm2-135m --json /proc/x.json",
)


def test_no_simple_mistake_waits_for_torch(tmp_path):
    (tmp_path / "recipe.yaml").write_text("sparsty: 0.3\n")
    (tmp_path / "some.txt").write_text("text\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/config.json").write_text('{"model_type": "llama", "num_hidden_layers": 90}')
    (tmp_path / "deep.gguf").write_bytes(b"GGUF" + bytes(20) + b"llama.block_count\x04\0\0\0\x5a\0\0\0")
    for name in ("empty", "damaged", "full", "pruned", "decoder", "classless"):
        (tmp_path / name).mkdir()
    (tmp_path / "classless/config.json").write_text("{}")
    make_run_folder(tmp_path / "stopped.run")
    (tmp_path / "stopped.run/choice.safetensors").touch()
    (tmp_path / "damaged/config.json").write_text("{")
    (tmp_path / "damaged.gguf").write_bytes(bytes(99))
    (tmp_path / "damaged.jsonl").write_text('{"text": "a"')
    (tmp_path / "full/mine").touch()
    (tmp_path / "pruned/report.json").write_text("{}")
    (tmp_path / "decoder/config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 64}'
    )
    command = [sys.executable, "-c", TYPE, json.dumps(MISTAKES)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    done = json.loads(run.stdout.splitlines()[-1])
    assert [words for words in MISTAKES if done.get(words, [0])[0] not in (1, 2)] == []
    assert {words: loaded for words, (_, loaded) in done.items() if loaded} == {}
    lines = run.stderr.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == len(MISTAKES)
    assert [line for line in lines if not line.startswith("error: ")] == 2 * ["asking the hub for nobody/nothing"]
    assert not (tmp_path / "x").exists()


def test_the_first_line_names_what_is_read_and_comes_before_torch(laboratory, tmp_path):
    model, pruned, text = (str(path) for path in (laboratory.open_model(), laboratory.open_pruned(), "text.txt"))
    (tmp_path / text).write_text("text\n" * 999)
    out = ["--data", text, "--out", "x"]
    commands = [
        ["prune", model, *out],
        ["prune", model, "--ladder", "0.2,0.4", *out],
        ["recover", pruned, *out],
        ["analyze", model],
        ["advise", model, "--data", text],
        ["shapes", model, "--data", text],
        ["bench", model],
        ["eval", model, "--data", text],
        ["export", model, "--out", "x"],
        ["verify", pruned],
    ]
    silent = [["prune", model, *out, "--quiet"], ["analyze", model, "--json", "-"]]
    command = [sys.executable, "-c", FIRST, json.dumps(commands + silent)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    said = [part.splitlines() for part in run.stderr.split("next\n")[1:]]
    assert [lines[1] for lines in said[: len(commands)]] == ["torch"] * len(commands)
    assert [words[1] in lines[0] for words, lines in zip(commands, said, strict=False)] == [True] * len(commands)
    assert [lines[0] for lines in said[len(commands) :]] == ["torch"] * len(silent)


def test_what_a_name_can_be_is_told_without_a_hub(tmp_path):
    for name in ("smollm2-135m", "gpt2", "someone/some-model", str(tmp_path)):
        check_model_name(name)
    with expect_error(FileError, name="smolm2-135m") as refused:
        check_model_name("smolm2-135m")
    assert refused.value.nearest[0] == "smollm2-135m"
    for name in (f"{tmp_path}/nothing", "./nothing", "a/b/c", "~/nothing", "a.gguf", "b.onnx"):
        with expect_error(FileError, name=name):
            check_model_name(name)


def test_a_folder_is_told_from_a_dense_model(laboratory, tmp_path):
    check_folder_named(laboratory.open_pruned(), "prune")
    check_folder_named(laboratory.open_ladder(), "prune")
    check_folder_named(laboratory.open_model(), "export")
    with expect_error(FileError, name=laboratory.open_model()):
        check_folder_named(laboratory.open_model(), "prune")


def test_only_what_must_be_text_is_looked_into(tmp_path):
    for name in ("inputs.safetensors", "sound.wav", "table.json"):
        (tmp_path / name).write_bytes(bytes(range(256)))
        check_sources(str(tmp_path / name))
    check_sources("self", "wikitext2", "someone/data:train", None)


def test_python_takes_what_the_command_line_takes_and_says_what_was_meant():
    assert with_keywords(mptk.Settings(), {"sparsity": "30%"}).sparsity == 0.3
    with expect_error(InputError, name="sparsity"):
        with_keywords(mptk.Settings(), {"sparsity": "much"})
    with pytest.raises(TypeError) as refused:
        with_keywords(mptk.Settings(), {"sparsty": 0.3})
    assert isinstance(refused.value, KeywordError)
    assert refused.value.nearest == ("sparsity",)
