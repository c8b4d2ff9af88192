"""Settings that all tests share: the same examples in every run, and no advice printed about tiny configs."""

from __future__ import annotations

import hypothesis
import transformers

hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("same")
transformers.logging.set_verbosity_error()
