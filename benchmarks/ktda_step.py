"""KTDA's training step against the published formulation, which runs the student a second time for the distillation.

Both take the same networks, batch and losses in one process; rounds are interleaved, ratios are taken within a round.
A pyramid student, FAM and a light decoder learn from a frozen ViT-S/14 (random weights: the arithmetic is the same).
Student and teacher have about the ratio of cost that the published pair has.

    python benchmarks/ktda_step.py [--student NAME] [--rounds N]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rsseg.data.streams import Batch, Samples
from rsseg.methods.ktda.method import KTDAMethod, build_method
from rsseg.methods.ktda.recipe import KTDARecipe
from rsseg.task import ClassInfo, Task

BATCH, SIDE, CLASSES = 4, 224, 6
GOAL, GOAL_BF16, LARGEST_DIFFERENCE = 1.4, 2.0, 1e-5


def make_method(student: str) -> KTDAMethod:
    classes = tuple(ClassInfo(name=str(i), value=i, color=(i, i, i)) for i in range(CLASSES))
    task = Task(name="bench", classes=classes, bands=("red", "green", "blue"), scale=(1 / 255,) * 3, offset=(0.0,) * 3)
    recipe = KTDARecipe.model_validate(
        {
            "method": "ktda",
            "name": "bench",
            "data": {"path": "unused", "augment": {"crop_size": SIDE}},
            "student": {"name": student, "weights": "random"},
            "teacher": {"name": "vit_small_patch14_dinov2", "weights": "random", "image_size": SIDE},
            "fam": {},
            "decoder": {"type": "segformer", "channels": 128, "dropout": 0.0},
            "aux": [{"level": 2, "channels": 64, "dropout": 0.0}],
        }
    )
    return build_method(recipe, task).train()


def make_batch() -> Batch:
    images = torch.rand(BATCH, 3, SIDE, SIDE)
    masks = torch.randint(0, CLASSES, (BATCH, SIDE, SIDE))
    return {"labeled": Samples(images, torch.ones_like(masks, dtype=torch.bool), masks)}


def published_step(method: KTDAMethod, batch: Batch) -> None:
    """Two passes of the student, and the divergence from softmax().log()."""
    segmenter, images, masks = method.segmenter, batch["labeled"].images, batch["labeled"].masks
    run = segmenter.run(images)
    aligned = segmenter.align(images)
    teacher = method.distillation.teacher_maps(images)
    loss = F.cross_entropy(segmenter.to_size(run.logits, masks.shape[-2:]), masks)
    for head in method.aux_heads:
        loss = loss + head.weight * F.cross_entropy(segmenter.to_size(head(run.features), masks.shape[-2:]), masks)
    (loss + published_distillation(aligned, teacher)).backward()


def published_distillation(student: list[Tensor], teacher: tuple[Tensor, ...]) -> Tensor:
    levels = [
        0.5 * F.kl_div(s.softmax(-1).log(), t.softmax(-1), reduction="batchmean") + 0.5 * F.mse_loss(s, t)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(levels).mean()


def our_step(method: KTDAMethod, batch: Batch, *, bf16: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        losses = method(batch, 0).losses
    torch.stack(list(losses.values())).sum().backward()


def seconds(method: KTDAMethod, step: Callable[[], None]) -> float:
    method.zero_grad(set_to_none=True)
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def gradients(method: KTDAMethod, step: Callable[[], None]) -> dict[str, Tensor]:
    """The gradient of each part as one vector.

    Not of each tensor: the divergence along a row does not change when a bias moves the whole row, so such a bias gets
    the rounding of a large sum that cancels, in either formulation.
    """
    method.zero_grad(set_to_none=True)
    step()
    segmenter = method.segmenter
    parts = {"student": segmenter.student, "fam": segmenter.fam, "decoder": segmenter.decoder, "aux": method.aux_heads}
    return {name: torch.cat([p.grad.flatten() for p in part.parameters()]) for name, part in parts.items()}


def report(name: str, ratios: list[float], goal: float) -> None:
    median = statistics.median(ratios)
    verdict = "met" if median >= goal else "missed"
    print(f"{name:24} {median:.2f}x [{min(ratios):.2f}-{max(ratios):.2f}]  goal {goal}x: {verdict}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--student", default="convnext_tiny")
    arguments.add_argument("--rounds", type=int, default=5)
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method, batch = make_method(chosen.student), make_batch()
    published = partial(published_step, method, batch)
    ours, ours_bf16 = (partial(our_step, method, batch, bf16=bf16) for bf16 in (False, True))
    print(f"{chosen.student} taught by ViT-S/14, batch {BATCH}, {SIDE} px, one thread, {chosen.rounds} rounds")

    expected, actual = gradients(method, published), gradients(method, ours)
    differences = {name: float((actual[name] - expected[name]).norm() / expected[name].norm()) for name in expected}
    seconds(method, ours_bf16)  # the first call of a kernel is slow
    rounds = [[seconds(method, step) for step in (published, ours, ours_bf16)] for _ in range(chosen.rounds)]
    print(f"published step: median {statistics.median(times[0] for times in rounds):.2f} s")
    report("one pass", [times[0] / times[1] for times in rounds], GOAL)
    report("one pass, bf16 autocast", [times[0] / times[2] for times in rounds], GOAL_BF16)
    worst = max(differences, key=lambda name: differences[name])
    verdict = "met" if differences[worst] <= LARGEST_DIFFERENCE else "missed"
    print(
        f"largest relative difference of a part's gradient, {worst}: {differences[worst]:.1e}  "
        f"goal {LARGEST_DIFFERENCE:.0e}: {verdict}"
    )


if __name__ == "__main__":
    main()
