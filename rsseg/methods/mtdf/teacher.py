"""A frozen teacher of RS-MTDF."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.backbones.backbone import Backbone
from rsseg.layers.frozen import Frozen
from rsseg.layers.resize import resize


class Teacher(nn.Module):
    """A frozen backbone with the way in which it sees images and is compared."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        input_size: int | None = None,
        bands: Sequence[int] | None = None,
        student_normalized: bool = False,
        grid: Literal["teacher", "student"] = "teacher",
        standardize: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        """See `TeacherConfig` for the arguments; `bands` are positions in the task's bands."""
        super().__init__()
        self.frozen = Frozen(backbone)
        self.input_size = input_size
        self.register_buffer("bands", None if bands is None else torch.tensor(bands), persistent=False)
        self.student_normalized = student_normalized
        self.grid = grid
        self.standardize = standardize
        self.loss_weight = loss_weight

    @torch.no_grad()
    def forward(self, images: Tensor, student: Backbone) -> Tensor:
        """float (B, C, H, W), scaled units -> the teacher's last map, float32 (B, D, h, w), without a graph."""
        backbone = cast(Backbone, self.frozen.module)
        if self.student_normalized:
            images = student.normalize(images)
        if self.bands is not None:
            images = images.index_select(1, cast(Tensor, self.bands))
        if self.input_size is not None:
            images = resize(images, (self.input_size, self.input_size), align_corners=True)
        maps = backbone.forward_normalized(images) if self.student_normalized else backbone(images)
        target = maps[-1].float()
        if self.standardize:
            target = F.layer_norm(target.movedim(1, -1), target.shape[1:2]).movedim(-1, 1)
        return target

    def loss(self, translated: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of the predicted map (B, D, h, w) and the teacher's, on the grid that was chosen."""
        with torch.autocast(translated.device.type, enabled=False):
            translated = translated.float()
            if self.grid == "teacher":
                translated = resize(translated, target.shape[-2:], align_corners=True)
            else:
                target = resize(target, translated.shape[-2:], align_corners=True)
            return F.mse_loss(translated, target)
