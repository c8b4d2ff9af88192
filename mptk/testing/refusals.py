"""What tests of refusals ask: the class of an error, what it is about and what would work. Its words are not asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from mptk.errors import MptkError


@contextmanager
def expect_error(
    kind: type[MptkError], *, name: str | Path | None = None, nearest: Sequence[object] | None = None
) -> Iterator[pytest.ExceptionInfo[MptkError]]:
    """Fail unless the code inside raises ``kind``, or a class under it, about ``name`` and with ``nearest``.

    ``with expect_error(BudgetError, name="sparsity") as refused``: after it, ``refused.value`` is the error. MptkError
    itself would take any refusal, so it has to be one of its classes.
    """
    assert kind is not MptkError, "say which class"
    with pytest.raises(kind) as refused:
        yield refused
    error = refused.value
    assert name is None or error.name == str(name), f"it is about {error.name!r}: {error}"
    assert nearest is None or error.nearest == tuple(nearest), f"it proposes {error.nearest}: {error}"
