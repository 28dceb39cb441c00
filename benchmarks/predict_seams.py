"""Pixels whose class differs between a tiled scene and one forward of the whole image.

    python benchmarks/predict_seams.py [--side 2700] [--steps 150] [--threads 2]

A convolutional student is trained on a synthetic scene first (about a minute): the borders of classes of a network that
was never trained lie anywhere, and would say nothing. Needs about 4 GB for the forward of the whole image.
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]


def make_land(side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image float32 (3, side, side) in 0..1 and classes (side, side): patches with colours, shading and noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 6, (side // 40 + 1, side // 40 + 1), np.uint8)
    classes = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_NEAREST)
    classes = cv2.medianBlur(cv2.medianBlur(classes, 31), 31)
    colors = np.random.default_rng(0).uniform(0.2, 0.8, (6, 3)).astype(np.float32)
    shade = cv2.resize(rng.normal(0, 0.08, (side // 16, side // 16)).astype(np.float32), (side, side))
    image = colors[classes] + shade[..., None] + rng.normal(0, 0.1, (side, side, 3)).astype(np.float32)
    return image.clip(0, 1).transpose(2, 0, 1), classes


def train(segmenter: torch.nn.Module, steps: int) -> None:
    image, classes = make_land(2048, 1)
    rng = np.random.default_rng(2)
    optimizer = torch.optim.AdamW(segmenter.parameters(), 2e-3)
    for _ in range(steps):
        places = rng.integers(0, 2048 - 256, (4, 2))
        images = torch.from_numpy(np.stack([image[:, y : y + 256, x : x + 256] for y, x in places]))
        targets = torch.from_numpy(np.stack([classes[y : y + 256, x : x + 256] for y, x in places])).long()
        loss = F.cross_entropy(segmenter(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    from benchmarks.scenes import make_segmenter
    from rsseg.config import EvalConfig
    from rsseg.inference.image import predict_image
    from rsseg.inference.predict import choose_tiling

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2700)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    segmenter = make_segmenter()
    train(segmenter, arguments.steps)
    segmenter.eval()
    image, classes = make_land(arguments.side, 3)
    whole = predict_image(segmenter, image, None, EvalConfig(tile=2 * arguments.side), device="cpu")
    print(f"accuracy of the whole image: {(whole == classes).mean():.4f}")
    print("merge | tile | overlap | compute | pixels that differ")
    for blend, tile in (("crop", None), ("crop", 1024), ("hann", None), ("mean", None)):
        config = EvalConfig(blend=blend, tile=tile, batch_size=1)
        tiling = choose_tiling(segmenter, tile, None, blend)
        plan = tiling.plan(arguments.side, arguments.side)
        tiled = predict_image(segmenter, image, None, config, device="cpu")
        print(
            f"{blend} | {plan.rows.tile} | {plan.overlap} | {plan.redundancy:.2f} | {(tiled != whole).mean():.4%}",
            flush=True,
        )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
