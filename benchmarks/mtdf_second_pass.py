"""What the second, low-resolution pass of an RS-MTDF student is worth, and what is left when it is dropped.

From a run whose teachers use `student_pass: resized`: scores on its test split, and time of a prediction, of

- the model as it is, with both passes;
- the same weights with `student_pass: shared`, not trained any further;
- these after a short distillation: `start` the run, `student_pass: shared`, a few steps at a fraction of the rate.

    python benchmarks/mtdf_second_pass.py RUN [--steps 60] [--lr-scale 0.25] [--threads 2]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from rsseg.checkpoint import find_model, read_header
from rsseg.data.sources import Datasets
from rsseg.evaluation.model import evaluate
from rsseg.inference.network import load_segmenter, ready_to_predict
from rsseg.methods.base import Segmenter
from rsseg.methods.mtdf.method import build_method
from rsseg.methods.mtdf.recipe import MTDFRecipe
from rsseg.recipe import recipe_from_dict
from rsseg.training.progress import Progress
from rsseg.training.run import train

CPU = torch.device("cpu")
ROUNDS = 5


def shortened(recipe: MTDFRecipe, model: Path, *, steps: int, lr_scale: float) -> MTDFRecipe:
    """The recipe of the short distillation."""
    main = recipe.optimizers["main"]
    schedule = main.schedule.model_copy(update={"warmup_steps": 0})
    trainer = {"steps": steps, "eval_every": steps, "checkpoint_every": steps, "monitor": "last"}
    return recipe.model_copy(
        update={
            "name": "one-pass",
            "start": model,
            "teachers": tuple(t.model_copy(update={"student_pass": "shared"}) for t in recipe.teachers),
            "optimizers": {"main": main.model_copy(update={"lr": lr_scale * main.lr, "schedule": schedule})},
            "trainer": recipe.trainer.model_copy(update=trainer),
        }
    )


def score(segmenter: Segmenter, recipe: MTDFRecipe) -> float:
    source = Datasets(recipe.data, recipe.seed).open(recipe.data.test, "test", segmenter.task, masks=True)
    found = evaluate(segmenter.eval(), recipe, source, device="cpu")
    return found.scores.miou or 0.0


@torch.inference_mode()
def compare_speed(two: Segmenter, one: Segmenter, side: int) -> None:
    images = torch.rand(4, len(two.task.bands), side, side)
    ready = [ready_to_predict(segmenter, CPU, torch.float32)[0] for segmenter in (two, one)]
    ratios = []
    for turn in range(ROUNDS + 1):
        seconds = []
        for network in ready:
            start = time.perf_counter()
            network.predict_logits(images)
            seconds.append(time.perf_counter() - start)
        if turn:  # the first round warms up
            ratios.append(seconds[0] / seconds[1])
    print(
        f"one pass is {statistics.median(ratios):.2f}x [{min(ratios):.2f}-{max(ratios):.2f}] as fast, {side} px, fp32"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder or model file")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr-scale", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = find_model(arguments.run)
    recipe = recipe_from_dict(read_header(model).recipe, str(model))
    assert isinstance(recipe, MTDFRecipe)
    two = load_segmenter(model)
    short = shortened(recipe, model, steps=arguments.steps, lr_scale=arguments.lr_scale)
    one = build_method(short, two.task).deployable()
    print(f"test mIoU, two passes: {score(two, recipe):.4f}", flush=True)
    print(f"test mIoU, one pass, same weights: {score(one, recipe):.4f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        result = train(short, output=Path(folder), progress=Progress())
        one = load_segmenter(result.model)
        print(f"test mIoU, one pass after {arguments.steps} steps: {score(one, recipe):.4f}", flush=True)
        two_passes = short.model_copy(update={"teachers": recipe.teachers})
        longer = load_segmenter(train(two_passes, output=Path(folder), progress=Progress()).model)
        print(f"test mIoU, two passes after the same {arguments.steps} steps: {score(longer, recipe):.4f}", flush=True)
    compare_speed(two, one, recipe.data.augment.crop_size)


if __name__ == "__main__":
    main()
