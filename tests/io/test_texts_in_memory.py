"""Texts that a caller has in memory: whatever gives strings, or rows with text in them, is data.

It reaches for mptk.run.given: a run does not show its windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pytest
import torch

from mptk import testing
from mptk.errors import DataError, InputError
from mptk.io import Loaded, open_live
from mptk.run.given import check_texts, collect_samples
from mptk.tasks import bind_task
from mptk.testing import expect_error

TEXTS = [" ".join(testing.WORDS[i : i + 9]) for i in range(9)]
ROWS = datasets.Dataset.from_dict({"text": TEXTS, "stars": list(range(9))})


class Series:
    """As pandas has it: a column that numbers may not index by position, and whose truth is no one value."""

    def __init__(self, values: list[str]) -> None:
        self.values = values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __bool__(self) -> bool:
        raise ValueError("the truth value of a series is ambiguous")


class Table(Series):
    """It iterates over the names of its columns."""

    def __iter__(self) -> Iterator[str]:
        return iter(["text"])

    def itertuples(self) -> Iterator[tuple[int, str]]:
        return enumerate(self.values)

    def to_dict(self, orient: str) -> list[dict[str, str]]:
        assert orient == "records"
        return [{"text": text} for text in self.values]


@pytest.fixture(scope="module")
def loaded():
    return open_live(testing.make_llama(), testing.make_tokenizer())


def windows(loaded: Loaded, data: Any, seed: int | None = None) -> torch.Tensor:
    return collect_samples(data, loaded, bind_task(loaded), 3, 8, seed).inputs["input_ids"]


FORMS: dict[str, Callable[[], Any]] = {
    "data set": lambda: ROWS,
    "column": lambda: ROWS["text"],
    "iterable data set": lambda: ROWS.to_iterable_dataset(),
    "generator": lambda: (text for text in TEXTS),
    "tuple": lambda: tuple(TEXTS),
    "rows": lambda: ({"text": text} for text in TEXTS),
    "endless": lambda: itertools.cycle(TEXTS),
    "series": lambda: Series(TEXTS),
    "table": lambda: Table(TEXTS),
    "series of pandas": lambda: pytest.importorskip("pandas").Series(TEXTS, index=range(5, 5 + len(TEXTS))),
    "table of pandas": lambda: pytest.importorskip("pandas").DataFrame({"text": TEXTS}),
    "stream": lambda: datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_texts_of_every_form_are_read_as_a_list_of_them_is(form, loaded):
    assert torch.equal(windows(loaded, FORMS[form]()), windows(loaded, TEXTS))


def test_no_more_of_an_endless_text_is_read_than_windows_are_chosen_from(loaded):
    assert windows(loaded, itertools.cycle(TEXTS), seed=0).shape == (3, 8)


@pytest.mark.parametrize("empty", [list, tuple, lambda: iter(()), lambda: ROWS.select([])])
def test_empty_data_is_said_to_be_empty(empty, loaded):
    with expect_error(DataError, name="data"):
        windows(loaded, empty())


def test_rows_without_text_are_refused(loaded):
    with expect_error(DataError, name="data"):
        windows(loaded, ROWS.remove_columns("text"))


def test_rows_of_tensors_are_inputs_as_before(loaded):
    ids = torch.arange(3, 51).view(6, 8)
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    assert torch.equal(windows(loaded, rows), ids[:3])


def test_texts_beside_a_vocabulary_may_be_of_a_data_set_and_are_not_lost_to_a_look():
    check_texts(data=ROWS, eval_data=ROWS["text"])
    texts: Iterator[str] = iter(TEXTS)
    with expect_error(InputError, name="data"):
        check_texts(data=texts)
    assert next(texts) == TEXTS[0]
