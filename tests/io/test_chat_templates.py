"""Chat templates of unknown origin end within bounds of time and memory, in one line; others write what they wrote."""

from __future__ import annotations

import json
import os
import resource
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from mptk import testing
from mptk.cli.main import app
from mptk.errors import DataError
from mptk.io import ChatTemplate
from mptk.io.chat_templates import Bounds
from mptk.testing import expect_error

TURNS = [{"role": "user", "content": "hi ü 🦊"}, {"role": "assistant", "content": "ho"}]
FOR = "{% for a in range(99999) %}"
DOUBLED = "{% set n = namespace(x=START) %}" + FOR + "{% set n.x = n.x OP n.x %}{% endfor %}"
BOMBS = {
    "loops": FOR * 3 + "{% endfor %}" * 3,
    "loops that write": FOR * 2 + "abcdefgh" * 99 + "{% endfor %}" * 2,
    "a long range": "{% for a in range(10 ** 12) %}{% endfor %}",
    "text times a number": "{{ 'a' * 10 ** 11 }}",
    "text that doubles": DOUBLED.replace("START", "'a'").replace("OP", "~"),
    "lists that double": DOUBLED.replace("START", "[1]").replace("OP", "+"),
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a wide text": "{{ 'a'.ljust(10 ** 11) }}{{ '%100000000000d' % 1 }}",
    "a wide filter": "{{ 'a' | center(10 ** 11) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "an escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "an escape by a global": "{{ cycler.__init__.__globals__.os.system('touch escaped') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "no template": "{% for %}",
    "an error": "{{ 1 / 0 }}",
    "its own error": "{{ raise_exception('only pairs') }}",
}
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are "
    "a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- for message in messages -%}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}<start_of_turn>{{ message['role'] }}\n"
    "{{ message['content'] | trim }}<end_of_turn>\n{%- endfor -%}"
)
OTHER = "{{ strftime_now('%Y') }}{{ messages | tojson }}{% if tools %}{{ tools }}{% endif %}"


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    made = testing.make_tokenizer(begin=True)
    made.chat_template = template
    return made


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("template", BOMBS.values(), ids=BOMBS)
def test_no_template_takes_more_than_its_time_and_memory(template):
    before, children, used = open_files(), psutil.Process().children(), resource.getrusage(resource.RUSAGE_CHILDREN)
    bounds = Bounds(seconds=0.25, memory=1 << 27)
    with ChatTemplate(tokenizer(template), bounds) as filled, expect_error(DataError, name="x"):
        filled.render(TURNS, "x", "y")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime < 2
    assert open_files() == before
    assert psutil.Process().children() == children


@pytest.mark.parametrize("template", [SMOLLM2, GEMMA, OTHER])
def test_other_templates_write_what_they_wrote(template):
    owner: Any = tokenizer(template)
    with ChatTemplate(owner) as filled:
        for asks in (False, True):
            text = owner.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=asks)
            assert filled.render(TURNS, "x", "y", add_generation_prompt=asks) == text
            ids = owner.apply_chat_template(TURNS, add_generation_prompt=asks, return_dict=True)["input_ids"]
            assert filled.encode(TURNS, "x", "y", add_generation_prompt=asks) == ids


def test_a_library_that_runs_out_of_memory_in_it_writes_nothing(capfd):
    long = tokenizer("a b " * (1 << 22))
    with ChatTemplate(long, Bounds(memory=1 << 26)) as filled, expect_error(DataError, name="x"):
        filled.encode(TURNS, "x", "y")
    assert capfd.readouterr().err == ""


def test_a_chat_after_a_refused_one_is_filled():
    """And each chat has its own time: a file may hold any number of them."""
    once = "{% for a in range(99999) %}{% endfor %}" * 5 + "{{ messages[0].content }}"
    refusing = tokenizer("{% if messages | length > 1 %}{{ 1 / 0 }}{% endif %}" + once)
    with ChatTemplate(refusing, Bounds(seconds=0.3)) as filled:
        with expect_error(DataError, name="x"):
            filled.render(TURNS, "x", "y")
        assert {filled.render(TURNS[:1], "x", "y") for _ in range(30)} == {TURNS[0]["content"]}


def test_a_process_that_gets_no_processor_time_is_stopped():
    bounds = Bounds(waiting=0.2)
    with ChatTemplate(tokenizer(BOMBS["loops"]), bounds) as filled, expect_error(DataError, name="x"):
        filled.render(TURNS, "x", "y")


def test_a_command_ends_in_one_line(laboratory, tmp_path):
    model = laboratory.copy(laboratory.open_model(), tmp_path / "model")
    for file in model.glob("*token*"):
        file.unlink()
    tokenizer(BOMBS["an escape"]).save_pretrained(model)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": TURNS}) + "\n")
    result = CliRunner().invoke(app, ["eval", str(model), "--data", str(chats), "--length", "8"])
    assert result.exit_code == 1
    assert isinstance(result.exception, DataError)
    assert result.exception.name == f"a chat of {chats}"
    assert "\n" not in str(result.exception)
