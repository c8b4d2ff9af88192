"""Command lines in this process, as the console script runs them."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from mptk import MptkError
from mptk.cli.main import app


def done(*words: object) -> Result:
    """What a command did, which must succeed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    return result


def refused(*words: object) -> str:
    """What a command said that failed: its own error, or what the parser of options printed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2 or isinstance(result.exception, MptkError), f"{result.output} {result.exception!r}"
    return " ".join(f"{result.exception} {result.stderr}".replace("│", " ").split())
