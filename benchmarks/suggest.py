"""Replay of label economy: hide the labels of a dataset, let each rule choose what to label next, train again.

    python benchmarks/suggest.py --data data/demo --domain north --backbone resnet_mini
    python benchmarks/suggest.py --page docs/results-suggest.md

Starts with a few labeled images, adds as many per round, and trains a new plain network of few steps each time.
Finished trainings are kept in `--out`, one line each, and are not repeated; `--page` writes the table of all of them.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rsseg.config import SelectConfig
from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.data.sources import select_items
from rsseg.evaluation.model_file import evaluate_model
from rsseg.files import append_line
from rsseg.inference.features import with_features
from rsseg.recipe import RecipeSource, parse_recipe
from rsseg.scene.blocks import dataset_images, load_reference, measure_blocks
from rsseg.scene.memory import prepare_model
from rsseg.scene.options import SceneOptions
from rsseg.scene.suggest import choose_blocks
from rsseg.training.progress import Progress
from rsseg.training.run import train

RULES: Mapping[str, tuple[str, ...] | None] = {
    "random": None,
    "entropy": (),
    "entropy x rarity": ("rarity",),
    "entropy x distance": ("distance",),
    "entropy x rarity x distance": ("rarity", "distance"),
}
"""Rule -> factors of its score besides entropy."""
SUGGEST = "entropy"
"""Rule of `rsseg suggest` without `--factors`."""
WHOLE = 1 << 16
"""Side of a block that holds any image."""


@dataclass(frozen=True)
class Setting:
    """What a result depends on besides rule, seed and round."""

    data: str
    domain: str | None
    backbone: str
    weights: str
    start: int
    add: int
    steps: int
    crop: int
    batch: int


@dataclass(frozen=True)
class Cell:
    """One training: its rule, seed and round, the labeled images and the scores on the test split."""

    setting: Setting
    rule: str
    seed: int
    round: int
    labeled: tuple[str, ...]
    miou: float
    seconds: float


def recipe_of(setting: Setting, labeled: Path, seed: int) -> Any:
    """A plain network with a light decoder, trained on the listed images without validation."""
    domain = {} if setting.domain is None else {"domain": setting.domain}
    pretrained = setting.weights != "random"
    values = {
        "method": "supervised",
        "name": "replay",
        "seed": seed,
        "data": {
            "path": setting.data,
            "augment": {"crop_size": setting.crop, "hflip": 0.5, "vflip": 0.5, "rot90": 0.5},
            "streams": {"labeled": {"split": "train", "items": str(labeled)}},
            "val": {"split": "val", **domain},
            "test": {"split": "test", **domain},
        },
        "backbone": {"name": setting.backbone, "weights": setting.weights},
        "decoder": {"type": "segformer", "channels": 32},
        "optimizers": {"main": {"lr": 1e-3 if pretrained else 3e-3, "schedule": {"warmup_steps": setting.steps // 10}}},
        "trainer": {
            "steps": setting.steps,
            "batch_size": setting.batch,
            "workers": 0,
            "eval_every": setting.steps,
            "checkpoint_every": setting.steps,
        },
    }
    return parse_recipe(RecipeSource("replay", yaml.safe_dump(values)))


def choose(
    rule: str, model: Path, index: SegmentationIndex, pool: Sequence[IndexItem], count: int, rng: np.random.Generator
) -> list[IndexItem]:
    """The images to label next."""
    factors = RULES[rule]
    if factors is None:
        return [pool[i] for i in rng.choice(len(pool), min(count, len(pool)), replace=False)]
    prepared = prepare_model(model, SceneOptions())
    prepared = replace(prepared, network=with_features(prepared.network, "suggest"))
    task = prepared.network.task
    images = dataset_images(index, pool, task.bands, SceneOptions())
    blocks = measure_blocks(prepared, images, WHOLE)
    chosen = choose_blocks(
        blocks,
        load_reference(model, prepared),
        count,
        classes=task.class_names,
        per_image=1,
        factors=factors,
    )
    return [pool[int(blocks.image[choice.block])] for choice in chosen]


def replay(setting: Setting, seed: int, rounds: int, done: Mapping[tuple[Any, ...], Cell], out: Path) -> None:
    """All rules of one seed; the first round is common to them."""
    index = SegmentationIndex.load(Path(setting.data))
    select = SelectConfig(split="train", domain=setting.domain)
    items = [item for item in select_items(index, select, split="train", seed=0) if item.mask is not None]
    order = np.random.default_rng(seed).permutation(len(items))
    first = [items[i] for i in order[: setting.start]]
    with tempfile.TemporaryDirectory() as folder:
        start, common, later = None, Path(folder, "first"), Path(folder, "later")
        for rule in RULES:
            labeled, rng, model = first, np.random.default_rng([seed, 1]), start
            for number in range(rounds + 1):
                if number:
                    names = {item.image for item in labeled}
                    pool = [item for item in items if item.image not in names]
                    known = done.get((setting, rule, seed, number))
                    if known is not None:
                        labeled = [item for item in items if item.image in known.labeled]
                    else:
                        if model is None and rule != "random":
                            model, _ = trained(setting, labeled, seed, later if number > 1 else common)
                            start = start if number > 1 else model
                        labeled = [*labeled, *choose(rule, model or Path(), index, pool, setting.add, rng)]
                key = (setting, rule if number else "random", seed, number)
                if key in done:
                    model = None if number else start
                    continue
                begin = time.process_time()
                model, miou = trained(setting, labeled, seed, later if number else common)
                start = start if number else model
                cell = Cell(
                    setting, key[1], seed, number, tuple(i.image for i in labeled), miou, time.process_time() - begin
                )
                append_line(out, json.dumps(asdict(cell)))
                done = {**done, key: cell}
                print(f"{setting.data} seed {seed} {rule:27} {len(labeled):3} images: mIoU {miou:.4f}", flush=True)


def trained(setting: Setting, labeled: Sequence[IndexItem], seed: int, folder: Path) -> tuple[Path, float]:
    """Model and mIoU on the test split."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    listed = folder / "labeled.txt"
    listed.write_text("".join(f"{item.image}\n" for item in labeled), encoding="utf-8")
    result = train(recipe_of(setting, listed, seed), output=folder / "runs", progress=Progress())
    miou = evaluate_model(result.model, split="test", device="cpu").scores.miou
    return result.model, 0.0 if miou is None else miou


def read(out: Path) -> dict[tuple[Any, ...], Cell]:
    """Finished trainings."""
    found = {}
    for line in out.read_text(encoding="utf-8").splitlines() if out.is_file() else ():
        values = json.loads(line)
        setting = Setting(**values.pop("setting"))
        values["labeled"] = tuple(values["labeled"])
        cell = Cell(setting=setting, **values)
        found[setting, cell.rule, cell.seed, cell.round] = cell
    return found


def needed(curve: Mapping[int, float], target: float) -> int | None:
    """The fewest labeled images whose mean mIoU reaches the target."""
    return next((images for images, miou in sorted(curve.items()) if miou >= target), None)


def page(cells: Mapping[tuple[Any, ...], Cell]) -> str:
    """The results of all settings as Markdown; only seeds that finished all rounds of all rules count."""
    lines = [
        "# What to label next: replay",
        "",
        "Made by `python benchmarks/suggest.py --page docs/results-suggest.md`. The labels of a dataset are hidden,",
        "each rule chooses whole images to label next, and a new plain network is trained after each round. Scores are",
        "mIoU on the test split: the mean over seeds, and its standard error. The trainings are short, so that the",
        f"scores are far below those of a full training. The rule of `rsseg suggest` is {SUGGEST}.",
        "",
    ]
    for setting in dict.fromkeys(cell.setting for cell in cells.values()):
        own = {key[1:]: cell for key, cell in cells.items() if key[0] == setting}
        rounds = max(number for _, _, number in own)
        every = [("random", 0), *((rule, n) for rule in RULES for n in range(1, rounds + 1))]
        seeds = [s for s in sorted({seed for _, seed, _ in own}) if all((r, s, n) in own for r, n in every)]
        where = setting.data.rstrip("/").rpartition("/")[2] + (f", {setting.domain}" if setting.domain else "")
        lines += [
            f"## {where}: {setting.backbone}, {setting.steps} steps",
            "",
            f"Weights {Path(setting.weights).name}, batches of {setting.batch} crops of {setting.crop} pixels; "
            f"{len(seeds)} seeds.",
            "",
        ]
        if not seeds:
            lines += ["No seed is complete.", ""]
            continue
        lines += ["| labeled images | " + " | ".join(RULES) + " |", "|---" * (len(RULES) + 1) + "|"]
        curves: dict[str, dict[int, float]] = {rule: {} for rule in RULES}
        for number in range(rounds + 1):
            images, row = setting.start + number * setting.add, []
            for rule in RULES:
                scores = np.array([own[rule if number else "random", seed, number].miou for seed in seeds])
                curves[rule][images] = float(scores.mean())
                error = f" ± {scores.std(ddof=1) / len(seeds) ** 0.5:.3f}" if len(seeds) > 1 else ""
                row.append(f"{scores.mean():.3f}{error}")
            lines.append(f"| {images} | " + " | ".join(row) + " |")
        last = setting.start + rounds * setting.add
        target = curves["random"][last]
        used = {rule: needed(curves[rule], target) for rule in RULES}
        words = [
            f"{rule} {'more than ' + str(last) if n is None else n}" for rule, n in used.items() if rule != "random"
        ]
        paired = [own[SUGGEST, s, rounds].miou - own["random", s, rounds].miou for s in seeds]
        reached = used[SUGGEST] is not None and used[SUGGEST] <= last * 2 / 3
        lines += [
            "",
            f"Random choice reaches {target:.3f} with {last} images; for that score {', '.join(words)} images were "
            f"needed. The goal, two thirds of the labels, is {'reached' if reached else 'not reached'} by the rule "
            f"of suggest. With {last} images it differs from random by {np.mean(paired):+.3f} on average over seeds "
            f"({min(paired):+.3f} to {max(paired):+.3f}).",
            "",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--domain")
    parser.add_argument("--backbone", default="resnet_mini")
    parser.add_argument("--weights", default="random", help="random, or a .safetensors file")
    parser.add_argument("--start", type=int, default=3)
    parser.add_argument("--add", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further seed after this time")
    parser.add_argument("--out", type=Path, default=Path("runs/suggest.jsonl"))
    parser.add_argument("--page", type=Path, help="write the results to this file")
    parser.add_argument("--quick", action="store_true", help="one round, one seed, 2 steps")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seeds, options.steps = 1, 1, 2
    begin = time.monotonic()
    if options.data is not None:
        setting = Setting(
            str(options.data),
            options.domain,
            options.backbone,
            options.weights,
            options.start,
            options.add,
            options.steps,
            options.crop,
            options.batch,
        )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        for seed in range(options.seeds):
            if time.monotonic() - begin < 60 * options.minutes:
                replay(setting, seed, options.rounds, read(options.out), options.out)
    if options.page is not None:
        options.page.write_text(page(read(options.out)), encoding="utf-8")


if __name__ == "__main__":
    main()
