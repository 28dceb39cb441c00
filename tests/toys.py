"""Tiny real networks for tests of inference."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.methods.base import Segmenter, TileHint
from rsseg.task import ClassInfo, Task


def make_task(bands: int = 3, classes: int = 3, *, first_value: int = 1, step: int = 10) -> Task:
    """Classes whose values are not their indices."""
    colors = [(0, 0, 255), (0, 255, 0), (255, 0, 0), (255, 255, 0), (0, 255, 255), (90, 90, 90)]
    names = ["water", "grass", "roof & wall", "road", "cloud", "soil"]
    return Task(
        name="toy",
        classes=tuple(ClassInfo(name=names[i], value=first_value + step * i, color=colors[i]) for i in range(classes)),
        bands=tuple(f"b{i + 1}" for i in range(bands)),
        scale=(1 / 255,) * bands,
        offset=(0.0,) * bands,
    )


class ConvSegmenter(Segmenter):
    """One seeded convolution."""

    def __init__(
        self,
        task: Task,
        *,
        kernel: int = 3,
        multiple: int = 1,
        tile: TileHint = TileHint(size=32, overlap=8, flexible=True),  # noqa: B008 - frozen
        fill: Sequence[float] | None = None,
    ) -> None:
        super().__init__(task, input_multiple=multiple, fill=fill or [0.5] * len(task.bands), tile=tile)
        self.conv = nn.Conv2d(len(task.bands), task.num_classes, kernel, padding=kernel // 2)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            self.conv.weight.normal_(generator=generator)
            self.conv.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] % self.input_multiple == 0
        assert images.shape[-2] % self.input_multiple == 0
        return self.conv(images - 0.5)


class IndexSegmenter(Segmenter):
    """Reads the class from the first band: scaled value k gives class k."""

    def __init__(self, task: Task, *, tile: TileHint = TileHint(size=32, overlap=8, flexible=True)) -> None:  # noqa: B008
        super().__init__(task, input_multiple=1, fill=[0.0] * len(task.bands), tile=tile)

    def forward(self, images: Tensor) -> Tensor:
        classes = torch.arange(self.task.num_classes, device=images.device, dtype=images.dtype)
        return -(images[:, :1] - classes[:, None, None]).abs()


class StridedSegmenter(Segmenter):
    """Decides by the mean of each block of 8 x 8 pixels, like a network that halves its input three times."""

    def __init__(self, task: Task) -> None:
        tile = TileHint(size=32, overlap=16, flexible=True)
        super().__init__(task, input_multiple=8, fill=[0.5] * len(task.bands), tile=tile)

    def forward(self, images: Tensor) -> Tensor:
        blocks = F.avg_pool2d(images, 8).repeat_interleave(8, -2).repeat_interleave(8, -1)
        return torch.cat([blocks, blocks.roll(1, 1)], 1)[:, : self.task.num_classes]


class SizeSegmenter(Segmenter):
    """Predicts everywhere whether it saw its training size (class 1) or not (class 0)."""

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.zeros(images.shape[0], self.task.num_classes, *images.shape[-2:])
        logits[:, int(images.shape[-2:] == (self.tile.size, self.tile.size))] = 1
        return logits
