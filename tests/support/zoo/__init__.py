"""A zoo of small networks of every form, with data and losses: what the sweep makes of each is in docs/zoo.md."""

from tests.support.zoo.forms import FORMS
from tests.support.zoo.graphs import GRAPHS
from tests.support.zoo.images import TIMM, TORCHVISION
from tests.support.zoo.language import TRANSFORMERS
from tests.support.zoo.losses import LOSSES
from tests.support.zoo.sequences import FREQUENCIES, SEQUENCES
from tests.support.zoo.specimen import Specimen

# The quick ones come first: `make test` runs a few of them.
ZOO: dict[str, Specimen] = {
    **SEQUENCES,
    **FREQUENCIES,
    **GRAPHS,
    **FORMS,
    **LOSSES,
    **TORCHVISION,
    **TIMM,
    **TRANSFORMERS,
}

__all__ = ["ZOO", "Specimen"]
