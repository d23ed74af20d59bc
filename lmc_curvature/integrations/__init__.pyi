from .lightning import LightningCallback as LightningCallback
from .transformers import TransformersCallback as TransformersCallback
