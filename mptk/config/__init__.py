"""Settings: their declarations, their checks, and the recipe that stores them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
