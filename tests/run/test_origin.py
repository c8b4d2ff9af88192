"""The inputs of a run must be the same at its end."""

from __future__ import annotations

from mptk.errors import ChangedError
from mptk.protocols.origin import Origin
from mptk.testing import expect_error


def test_a_message_names_the_first_changed_files_and_counts_the_others() -> None:
    before = Origin(parts={f"text/{n}.md": "a" for n in range(40)})
    before.require(before)
    with expect_error(ChangedError, name=", ".join([*sorted(before.parts)[:8], "32 more"])):
        before.require(Origin(parts=dict.fromkeys(before.parts, "b")))
    with expect_error(ChangedError, name="text/7.md"):
        before.require(Origin(parts={**before.parts, "text/7.md": "b"}))
