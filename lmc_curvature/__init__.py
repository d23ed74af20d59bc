"""Can two neural networks be averaged? Loss barriers predicted from exact curvature, and measured.

The public names are listed in `__init__.pyi`; each is imported from its module when it is first used.
"""

import threading as _threading
from typing import Any as _Any

import lazy_loader as _lazy_loader

from lmc_curvature import errors as errors

__version__ = "0.1.0"

_import_name, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)
_lock = _threading.RLock()


def __getattr__(name: str) -> _Any:
    # One thread at a time: one that imports a room and one that imports a file of it would wait for each other.
    with _lock:
        return _import_name(name)
