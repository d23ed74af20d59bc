"""Can two neural networks be averaged? Loss barriers predicted from exact curvature, and measured.

The public names are listed in `__init__.pyi`; each is imported from its module when it is first used.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
