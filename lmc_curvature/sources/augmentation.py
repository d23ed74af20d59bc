"""Random crops and mirror images, drawn for a whole epoch at once and applied to whole batches.

The standard augmentation for small images (He et al. 2015, section 4.2): pad by 4 black pixels, cut out a window of the
original size, mirror it half of the time. Draws come from one CPU generator and belong to positions in the epoch, so
they are the same on every device and for every batch size.
"""

import dataclasses

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor
from torch.nn import functional

PADDING = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Crops:
    """The window and the mirroring of each image of an epoch, by its position in the epoch.

    Attributes:
        rows: Upper edge of the window in the padded image, 0 to 2 × `PADDING`.
        columns: Left edge, likewise.
        mirrored: Whether left and right are exchanged.
    """

    rows: Int64[Tensor, " positions"]
    columns: Int64[Tensor, " positions"]
    mirrored: Bool[Tensor, " positions"]

    @classmethod
    def draw(cls, count: int, generator: torch.Generator) -> "Crops":
        """Draw for `count` positions, uniformly and independently."""
        edges = torch.randint(2 * PADDING + 1, (2, count), generator=generator)
        return cls(edges[0], edges[1], torch.randint(2, (count,), generator=generator).bool())

    def to(self, device: torch.device) -> "Crops":
        """The same draws on another device."""
        return Crops(self.rows.to(device), self.columns.to(device), self.mirrored.to(device))

    def apply(
        self, images: UInt8[Tensor, "batch channels height width"], start: int
    ) -> UInt8[Tensor, "batch channels height width"]:
        """Augment the images at positions `start`, `start` + 1, … of the epoch."""
        chosen = slice(start, start + len(images))
        height, width = images.shape[2:]
        padded = functional.pad(images, (PADDING,) * 4)
        # A view of every window of every image; picking one for each image is the only copy.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        each = torch.arange(len(images), device=images.device)
        cropped = windows[each, :, self.rows[chosen], self.columns[chosen]]
        return torch.where(self.mirrored[chosen, None, None, None], cropped.flip(3), cropped)
