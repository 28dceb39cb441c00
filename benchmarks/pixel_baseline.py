"""How far colour alone goes: multinomial logistic regression on the bands of single pixels.

    python benchmarks/pixel_baseline.py --data data/demo

Trains on valid labeled pixels of the train split, standardised per band, with LBFGS to convergence; prints the scores
on the test split. Images of another domain than the training images' are left out unless --domain says otherwise.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsseg.data.dataset import SampleReader
from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.metrics import ConfusionMatrix, Scores, scores
from rsseg.task import IGNORE_INDEX


def pixels(reader: SampleReader, items: Sequence[IndexItem]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint8]]]:
    """Per image: values (n, bands) and class indices (n,) of the valid labeled pixels."""
    for item in items:
        image, valid = reader.image(item)
        mask = reader.mask(item)
        known = valid & (mask != IGNORE_INDEX)
        yield image[:, known].T.astype(np.float32), mask[known]


def fit(values: Tensor, classes: Tensor, num_classes: int) -> nn.Module:
    """Standardisation and a linear layer that minimises the cross-entropy."""
    mean, std = values.mean(0), values.std(0).clamp(min=1e-6)
    linear = nn.Linear(values.shape[1], num_classes)
    standard = (values - mean) / std
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(linear(standard), classes)
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        linear.bias -= linear.weight @ (mean / std)
        linear.weight /= std
    return linear.eval()


def baseline(data: Path, *, split: str, domain: str | None, samples: int, seed: int) -> Scores:
    index = SegmentationIndex.load(data)
    reader = SampleReader(index, index.task.bands, cache=False)
    train = [item for item in index.items if item.split == "train" and item.mask is not None]
    domains = {item.domain for item in train} if domain is None else {domain}
    test = [i for i in index.items if i.split == split and i.mask is not None and i.domain in domains]
    if not train or not test:
        raise SystemExit(f"{data}: no labeled images in train or in {split} (domains {domains}).")
    generator = np.random.default_rng(seed)
    drawn = []
    for values, classes in pixels(reader, train):
        chosen = generator.choice(len(classes), min(samples // len(train), len(classes)), replace=False)
        drawn.append((values[chosen], classes[chosen]))
    torch.manual_seed(seed)
    model = fit(
        torch.from_numpy(np.concatenate([values for values, _ in drawn])),
        torch.from_numpy(np.concatenate([classes for _, classes in drawn]).astype(np.int64)),
        index.task.num_classes,
    )
    matrix = ConfusionMatrix(index.task.num_classes)
    with torch.inference_mode():
        for values, classes in pixels(reader, test):
            matrix.update(model(torch.from_numpy(values)).argmax(1).to(torch.uint8), torch.from_numpy(classes))
    return scores(matrix.counts, index.task.class_names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="prepared dataset")
    parser.add_argument("--split", default="test", help="split that is scored")
    parser.add_argument("--domain", help="domain that is scored; by default those of the training images")
    parser.add_argument("--samples", type=int, default=200_000, help="training pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print all scores as JSON")
    options = parser.parse_args()
    result = baseline(
        options.data, split=options.split, domain=options.domain, samples=options.samples, seed=options.seed
    )
    if options.json:
        print(result.model_dump_json(indent=1))
        return
    per_class = ", ".join(f"{c.name} {'-' if c.iou is None else format(c.iou, '.3f')}" for c in result.classes)
    print(f"per-pixel logistic regression, {options.split} split: mIoU {result.miou:.3f} (IoU {per_class})")


if __name__ == "__main__":
    main()
