"""feature: the protocol of a feature, for packages that bring one. It stands in ``mptk/plugins.py``, below settings."""

from __future__ import annotations

from mptk.plugins import Command as Command
from mptk.plugins import Feature as Feature
