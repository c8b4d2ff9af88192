"""The values that stages hand on, the protocols of methods, targets and tasks, the report, and the folder of a run."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
