"""Confusion-matrix update against torchmetrics: equal counts, ratio in one run.

Run: python benchmarks/confusion_matrix.py
"""

import statistics
import time
from collections.abc import Callable

import torch
from torchmetrics.classification import MulticlassConfusionMatrix

from rsseg.metrics import ConfusionMatrix

ROUNDS = 15
GOAL = 15.0


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    print(f"batch 8 x 512 x 512, 1 % unlabeled, one thread, {ROUNDS} rounds; goal {GOAL:.0f}x")
    worst = float("inf")
    for classes in (6, 19):
        target = torch.randint(0, classes, (8, 512, 512), generator=generator, dtype=torch.uint8)
        target[torch.rand(target.shape, generator=generator) < 0.01] = 255
        prediction = torch.randint(0, classes, (8, 512, 512), generator=generator, dtype=torch.uint8)
        wide_target, wide_prediction = target.long(), prediction.long()
        theirs = MulticlassConfusionMatrix(classes, ignore_index=255)
        ours = ConfusionMatrix(classes)
        theirs.update(wide_prediction, wide_target)
        ours.update(prediction, target)
        assert torch.equal(theirs.compute(), ours.counts[:-1]), "counts differ"
        pairs = [
            (
                seconds(lambda: theirs.update(wide_prediction, wide_target)),  # noqa: B023 - called at once
                seconds(lambda: ours.update(prediction, target)),  # noqa: B023
            )
            for _ in range(ROUNDS)
        ]
        ratios = sorted(a / b for a, b in pairs)
        ratio = statistics.median(ratios)
        worst = min(worst, ratio)
        milliseconds = [1e3 * statistics.median(column) for column in zip(*pairs, strict=True)]
        print(
            f"{classes:2d} classes: torchmetrics {milliseconds[0]:.1f} ms, rsseg {milliseconds[1]:.2f} ms, "
            f"ratio {ratio:.1f} [{ratios[0]:.1f}-{ratios[-1]:.1f}], equal counts"
        )
    print("goal met" if worst >= GOAL else "GOAL MISSED")


if __name__ == "__main__":
    main()
