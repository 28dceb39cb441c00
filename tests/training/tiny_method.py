"""A method of a few parameters, with a frozen teacher, for the trainer alone."""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsseg.config import BaseRecipe
from rsseg.data.streams import Batch, Samples, StreamSpec
from rsseg.layers.ema import Frozen
from rsseg.methods.base import Method, ParamGroup, Segmenter, StepOutput, TileHint
from rsseg.task import IGNORE_INDEX, ClassInfo, Task

TASK = Task(
    name="toy",
    classes=tuple(ClassInfo(name=f"c{i}", value=i, color=(i, i, i)) for i in range(3)),
    bands=("red", "green"),
    scale=(1.0, 1.0),
    offset=(0.0, 0.0),
)


class ToyRecipe(BaseRecipe):
    def stream_names(self) -> tuple[str, ...]:
        return ("labeled",)

    def optimizer_names(self) -> tuple[str, ...]:
        return ("body", "head")


class ToySegmenter(Segmenter):
    def __init__(self) -> None:
        super().__init__(TASK, input_multiple=1, fill=(0.0, 0.0), tile=TileHint(size=8, overlap=0, flexible=True))
        self.net = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 3, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


class ToyMethod(Method):
    """Cross-entropy and the distance to a frozen teacher; the head has an optimizer of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.segmenter = ToySegmenter()
        self.teacher = Frozen(nn.Conv2d(2, 3, 1))
        self.streams = (StreamSpec("labeled", "train", masks=True, fill=(0.0, 0.0)),)

    def training_step(self, batch: Batch, step: int) -> StepOutput:
        images, masks = batch["labeled"].images, batch["labeled"].masks
        assert masks is not None
        logits = self.segmenter(images)
        seg = F.cross_entropy(logits, masks, ignore_index=IGNORE_INDEX)
        return StepOutput({"seg": seg, "teach": 0.1 * F.mse_loss(logits, self.teacher(images))})

    def param_groups(self) -> Mapping[str, Sequence[ParamGroup]]:
        return {
            "body": [ParamGroup(list(self.segmenter.net[:2].parameters()), lr_scale=0.5)],
            "head": [ParamGroup(list(self.segmenter.net[3].parameters()), weight_decay=0.0)],
        }

    def deployable(self) -> Segmenter:
        return self.segmenter


def toy_recipe(**trainer: object) -> ToyRecipe:
    optimizers = {"body": {"name": "adamw", "lr": 0.01}, "head": {"name": "sgd", "lr": 0.1}}
    return ToyRecipe.model_validate(
        {"name": "toy", "data": {"path": "none"}, "optimizers": optimizers, "trainer": {"steps": 4, **trainer}}
    )


def toy_batches(recipe: BaseRecipe, start: int, rank: int, world_size: int) -> Iterator[Batch]:
    """Float64 batches of two; position p is the same sample whatever the number of ranks."""
    micro = start * recipe.trainer.grad_accum_steps
    while True:
        samples = []
        for position in range((micro * world_size + rank) * 2, (micro * world_size + rank) * 2 + 2):
            generator = torch.Generator().manual_seed(position)
            images = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
            samples.append((images, torch.randint(0, 3, (6, 6), generator=generator)))
        images, masks = (torch.stack(part) for part in zip(*samples, strict=True))
        yield {"labeled": Samples(images, valid=torch.ones(2, 6, 6, dtype=torch.bool), masks=masks)}
        micro += 1
