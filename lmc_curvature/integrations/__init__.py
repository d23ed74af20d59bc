"""Callbacks that record barriers and eigenvalues while Lightning or Hugging Face's Trainer trains a network."""

import lazy_loader as _lazy_loader

# Each is imported when it is used, with the trainer that it belongs to: nobody needs both.
__getattr__, __dir__, __all__ = _lazy_loader.attach_stub(__name__, __file__)
