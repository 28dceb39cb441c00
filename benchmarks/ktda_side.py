"""What KTDA's side branch adds to a plain training step of the same network, in processor time.

    python -m benchmarks.ktda_side [--rounds N]

EfficientNet-Lite0 with a SegFormer head, batches of 8 crops of 252 pixels, float32, one thread; the teacher is DINOv2-S
with random weights (the arithmetic is the same). Rounds are interleaved, ratios are taken within a round: the branch
alone, with the teacher's maps given, the whole step, in which the teacher runs too, and the same on images that it has
seen before (crops that repeat).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.scenes import make_task
from rsseg.data.assembly import SampleKeys
from rsseg.data.streams import Batch, Samples
from rsseg.methods.base import Method
from rsseg.methods.ktda.method import KTDAMethod
from rsseg.methods.registry import method_for
from rsseg.recipe import recipe_from_dict

BATCH, SIDE, CLASSES = 8, 252, 5
GOAL = 1.15
STUDENT = {"name": "tf_efficientnet_lite0", "weights": "random"}
DECODER = {"type": "segformer", "channels": 128}


def make(method: str, **parts: Any) -> Method:
    values = {"method": method, "name": "x", "data": {"path": "x", "augment": {"crop_size": SIDE}}, "decoder": DECODER}
    return method_for(recipe_from_dict(values | parts, "benchmark"), make_task(CLASSES)).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = make("supervised", backbone=STUDENT)
    teacher = {"name": "vit_small_patch14_dinov2", "weights": "random", "image_size": SIDE}
    side = make("ktda", student=STUDENT, teacher=teacher, fam={"path": "side"}, distillation={"loss": "cosine"})
    assert isinstance(side, KTDAMethod)
    assert side.distillation is not None
    images, masks = torch.rand(BATCH, 3, SIDE, SIDE), torch.randint(0, CLASSES, (BATCH, SIDE, SIDE))
    batch = {"labeled": Samples(images, torch.ones_like(masks, dtype=torch.bool), masks)}
    known = {"labeled": replace(batch["labeled"], keys=SampleKeys(tuple(range(BATCH)), BATCH))}
    maps, run_teacher = side.distillation.teacher_maps(images), side.distillation.teacher_maps

    def step(method: Method, batch: Batch = batch) -> float:
        method.zero_grad(set_to_none=True)
        started = time.process_time()
        torch.stack(list(method(batch, 0).losses.values())).sum().backward()
        return time.process_time() - started

    def branch_alone() -> float:
        side.distillation.teacher_maps = lambda *_: maps  # type: ignore[method-assign, union-attr]
        seconds = step(side)
        side.distillation.teacher_maps = run_teacher  # type: ignore[method-assign, union-attr]
        return seconds

    kinds: dict[str, Callable[[], float]] = {
        "branch, maps given": branch_alone,
        "branch and teacher": lambda: step(side),
        "images seen before": lambda: step(side, known),
    }
    step(plain), step(side), step(side, known)  # the first call of a kernel is slow
    ratios: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        base = step(plain)
        for name, seconds in kinds.items():
            ratios[name].append(seconds() / base)
    for name, values in ratios.items():
        print(f"{name:20} {statistics.median(values):.2f}x [{min(values):.2f}-{max(values):.2f}] of the plain step")
    met = statistics.median(ratios["branch, maps given"]) <= GOAL
    print(f"goal for the branch {GOAL}x: {'met' if met else 'missed'}")


if __name__ == "__main__":
    main()
