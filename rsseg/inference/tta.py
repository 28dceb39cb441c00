"""Views of an image whose predictions are averaged, and the sizes that networks see."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rsseg.config import EvalConfig


class View(NamedTuple):
    """One way to look at an image: scaled, then mirrored left to right."""

    scale: float
    flip: bool


TestTimeViews = Literal["none", "flip", "d4"]
"""`flip` adds the mirror image, `d4` all eight turns and mirrorings of a square."""


class Pose(NamedTuple):
    """One way to lay a tile before the network: mirrored left to right or not, then turned by quarters."""

    mirrored: bool
    quarters: int

    def apply(self, images: Tensor) -> Tensor:
        """(..., h, w), laid this way."""
        return torch.rot90(images.flip(-1) if self.mirrored else images, self.quarters, (-2, -1))

    def undo(self, scores: Tensor) -> Tensor:
        """(..., h, w), laid back."""
        turned = torch.rot90(scores, -self.quarters, (-2, -1))
        return turned.flip(-1) if self.mirrored else turned


def poses_of(views: TestTimeViews) -> tuple[Pose, ...]:
    """The first one is the tile as it is."""
    mirrorings = (False,) if views == "none" else (False, True)
    return tuple(Pose(m, q) for q in (range(4) if views == "d4" else range(1)) for m in mirrorings)


def views_of(config: EvalConfig) -> tuple[View, ...]:
    """All scales, each as it is and mirrored if the recipe asks for that."""
    return tuple(View(scale, flip) for scale in config.scales for flip in ((False, True) if config.flip else (False,)))


def scaled_size(size: tuple[int, int], scale: float, multiple: int | None) -> tuple[int, int]:
    """Height and width times `scale`, each to the nearest pixel or the nearest multiple (half up), at least one."""
    step = multiple or 1
    height, width = (max(int(side * scale / step + 0.5), 1) * step for side in size)
    return height, width


def interpolate(image: Tensor, size: tuple[int, int], *, align_corners: bool) -> Tensor:
    """Resize (C, H, W) bilinearly without antialiasing, as OpenCV does; returns it as it is if it has the size."""
    if image.shape[1:] == size:
        return image
    return F.interpolate(image[None], size, mode="bilinear", align_corners=align_corners)[0]
