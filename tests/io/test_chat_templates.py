"""Chat templates of unknown origin end within bounds of time and memory, in one line; others write what they wrote."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
from commands import refused
from inside import Inside
from transformers import PreTrainedTokenizerFast

from mptk import MptkError, testing
from mptk.io.chat_templates import ChatTemplate
from mptk.io.text.files import read_row_texts

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
def test_no_template_takes_more_than_its_time_and_memory(template: str, inside: Inside) -> None:
    inside.bound("mptk.io.chat_templates.TEMPLATE_SECONDS", 0.5)
    inside.bound("mptk.io.chat_templates.TEMPLATE_MEMORY", 1 << 27)
    before, used = open_files(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(MptkError, match=r"the model's chat template refuses a chat of x: .+; name a column") as raised:
        list(read_row_texts([{"messages": TURNS}], "x", None, tokenizer(template)))
    assert "\n" not in str(raised.value)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime < 2
    assert open_files() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("template", [SMOLLM2, GEMMA, OTHER])
def test_other_templates_write_what_they_wrote(template: str) -> None:
    owner: Any = tokenizer(template)
    with ChatTemplate(owner) as filled:
        for asks in (False, True):
            text = owner.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=asks)
            assert filled.render(TURNS, "x", "y", add_generation_prompt=asks) == text
            ids = owner.apply_chat_template(TURNS, add_generation_prompt=asks, return_dict=True)["input_ids"]
            assert filled.encode(TURNS, "x", "y", add_generation_prompt=asks) == ids


def test_a_library_that_runs_out_of_memory_in_it_writes_nothing(
    inside: Inside, capfd: pytest.CaptureFixture[str]
) -> None:
    inside.bound("mptk.io.chat_templates.TEMPLATE_MEMORY", 1 << 26)
    long = tokenizer("a b " * (1 << 22))
    with ChatTemplate(long) as filled, pytest.raises(MptkError, match="takes more than"):
        filled.encode(TURNS, "x", "y")
    assert capfd.readouterr().err == ""


def test_a_chat_after_a_refused_one_is_filled(inside: Inside) -> None:
    """And each chat has its own time: a file may hold any number of them."""
    once = "{% for a in range(99999) %}{% endfor %}" * 20 + "{{ messages[0].content }}"
    inside.bound("mptk.io.chat_templates.TEMPLATE_SECONDS", 1.0)
    with ChatTemplate(tokenizer("{% if messages | length > 1 %}{{ 1 / 0 }}{% endif %}" + once)) as filled:
        with pytest.raises(MptkError, match="division by zero"):
            filled.render(TURNS, "x", "y")
        assert {filled.render(TURNS[:1], "x", "y") for _ in range(30)} == {TURNS[0]["content"]}


def test_a_process_that_gets_no_processor_time_is_stopped(inside: Inside) -> None:
    inside.bound("mptk.io.chat_templates.WAITING_SECONDS", 0.2)
    with ChatTemplate(tokenizer(BOMBS["loops"])) as filled, pytest.raises(MptkError, match="takes more than 5 s"):
        filled.render(TURNS, "x", "y")


def test_a_command_ends_in_one_line(tmp_path: Path) -> None:
    testing.save_model(testing.make_llama(), tmp_path / "model", tokenizer(BOMBS["an escape"]))
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    said = refused("eval", tmp_path / "model", "--data", tmp_path / "chats.jsonl", "--length", 8)
    assert "the model's chat template refuses a chat of" in said
    assert "unsafe" in said
