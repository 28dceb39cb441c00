"""Deciding the pixels of a tile on a CPU: OpenCV and NumPy against torch, on one thread.

    python -m benchmarks.decide [--rounds 5]

Logits of 256 x 256 cells become the classes, or classes and confidence, of 1024 x 1024 pixels. Rounds are interleaved,
ratios are taken within a round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.scenes import processor
from rsseg.inference.blend import CLASSES_ONLY, ArrayLogits, PixelOutputs
from rsseg.inference.tiling import Span
from rsseg.inference.torch_network import TensorLogits, decide

CELLS, SIDE = 256, 1024


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{processor()}: torch's seconds over those of OpenCV and NumPy")
    whole = Span(0, SIDE)
    for classes in (2, 6, 20, 32, 60, 150):
        coarse = torch.randn(1, classes, CELLS // 16, CELLS // 16)
        low = F.interpolate(coarse, (CELLS, CELLS), mode="bicubic").contiguous(memory_format=torch.channels_last)
        tensor = TensorLogits(low, (SIDE, SIDE), (SIDE, SIDE))
        array = ArrayLogits(low[0].contiguous().numpy(), (SIDE, SIDE), (SIDE, SIDE))
        for what, outputs in (("classes", CLASSES_ONLY), ("with confidence", PixelOutputs(confidence=True))):

            def by_torch(tensor: TensorLogits = tensor, outputs: PixelOutputs = outputs) -> None:
                for _, values in tensor.bands(whole):
                    decide(values.permute(1, 2, 0), outputs)

            def by_array(array: ArrayLogits = array, outputs: PixelOutputs = outputs) -> None:
                array.decide(whole, whole, outputs)

            by_torch(), by_array()  # the first call is slow
            ratios = [seconds(by_torch) / seconds(by_array) for _ in range(rounds)]
            print(f"{classes:4} {what:16} {statistics.median(ratios):.2f}x [{min(ratios):.2f}-{max(ratios):.2f}]")


if __name__ == "__main__":
    main()
