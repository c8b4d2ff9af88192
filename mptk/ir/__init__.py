"""ir: the data types of the compiler: programs, axes, families, plans and the pass protocol."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
