"""``tests/messages.txt`` has every sentence that mptk can raise: one clear line, cause; remedy."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

from tests.messages import FILE, Sentence, find_sentences, list_error_classes, write_golden

NO_REMEDY = {"TargetError": 17, "PlanError": 15, "InputError": 12, "AnalysisError": 5}
NO_REMEDY |= dict.fromkeys(("FileError", "ModelError", "DataError"), 3)
NO_REMEDY |= dict.fromkeys(("MachineError", "ProofError", "TraceError"), 1)
"""Sentences without a semicolon, by class; these numbers may only fall. Most are reasons that stand in another sentence,
say what to write after a colon, or are made elsewhere as a whole."""
WORDS_WITH_CAPITALS = ("FSDP", "GPTQ", "AWQ", "ONNX")


@cache  # reading the whole product takes seconds
def list_sentences() -> list[Sentence]:
    return find_sentences()


def list_raised() -> list[Sentence]:
    return [each for each in list_sentences() if each.kind in list_error_classes() - {"BadParameter"}]


def test_the_file_is_what_the_code_says():
    assert FILE.read_text() == write_golden(list_sentences()), "run `make messages`, and read what has changed"


def test_each_sentence_is_one_line_without_a_full_stop():
    assert [e.text for e in list_raised() if re.search(r"\\n|  |^ |[ .]$", e.text)] == []
    assert [e.text for e in list_raised() if e.text[0].isupper() and not e.text.startswith(WORDS_WITH_CAPITALS)] == []


def test_each_sentence_has_a_remedy():
    assert Counter(e.kind for e in list_raised() if ";" not in e.text) == NO_REMEDY


def test_no_sentence_is_for_two_classes():
    whole = [e for e in list_raised() if not re.fullmatch(r"{\w+}", e.text)]  # else it is made elsewhere
    kinds = {text: {e.kind for e in whole if e.text == text} for text in {e.text for e in whole}}
    assert {text: found for text, found in kinds.items() if len(found) > 1} == {}


def test_each_class_is_raised():
    kinds = {each.kind for each in list_raised()}
    assert kinds == list_error_classes() - {"BadParameter", "MptkError"}, "MptkError stands for all of them"
