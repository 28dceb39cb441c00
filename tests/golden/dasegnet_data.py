"""ST-DASegNet's golden cases outside the network: tiling, label colours, metrics, learning rates."""

import math
import re
from collections.abc import Iterable

import numpy as np
import torch

from rsseg.config import ScheduleConfig
from rsseg.data.index import LabelMap
from rsseg.data.labels import LabelTable
from rsseg.datasets.cards import CARDS
from rsseg.datasets.layouts import PathPattern
from rsseg.datasets.prepare.tiles import Grid
from rsseg.metrics import ConfusionMatrix, scores
from rsseg.training.step import lr_at
from tests.golden.builders import mmseg_scores
from tests.golden.case import Case
from tests.golden.harness import Drivers
from tests.golden.settings import plain

ISPRS_VALUES = {255: 0} | {index: index + 1 for index in range(6)}
PUBLISHED = {
    "potsdam": ("potsdam", ISPRS_VALUES),
    "vaihingen": ("vaihingen", ISPRS_VALUES),
    "gf2": ("gid5", {255: 0, 0: 1, 1: 2, 2: 3, 3: 3, 4: 4}),  # meadow is merged into forest
    "cityosm": ("city-osm", {0: 0, 1: 1, 2: 2}),
}
"""Name of a published script, in lower case letters and digits -> our card, and its value for each of our indices."""
RULE = "st-dasegnet"


def published(script: str) -> tuple[str, dict[int, int]]:
    """Entry of a script, with or without the suffix `.py`."""
    return PUBLISHED[re.sub(r"[^a-z0-9]", "", script.lower().removesuffix(".py"))]


def published_grid(script: str, tile: int, stride: int) -> Grid:
    """Grid of our card's rule at the given tile and stride."""
    card, _ = published(script)
    grid = CARDS[card].choose_rule(RULE).grid
    assert grid is not None
    return grid if (grid.tile, grid.stride) == (tile, stride) else grid.resized(tile, stride)


def check_tiling(case: Case) -> None:
    """Origins, number, extent and names of the tiles of every listed image or label file."""
    for row in case.meta["rows"]:
        tile = row["clip"]
        windows = published_grid(row["script"], tile, row["stride"]).windows(row["height"], row["width"])
        assert {(window.height, window.width) for window in windows} == {(tile, tile)}
        columns, rows = (sorted(set(origins)) for origins in zip(*((w.col, w.row) for w in windows), strict=True))
        scene = scene_named(published(row["script"])[0], row["source_name"])
        places = [f"{scene}_{w.col}_{w.row}_{w.col + tile}_{w.row + tile}.png" for w in (windows[0], windows[-1])]
        actual = {
            "x_starts": columns,
            "y_starts": rows,
            "count": len(windows),
            "covered": [columns[-1] + tile, rows[-1] + tile],
            "first_file": places[0],
            "last_file": places[1],
        }
        for key in actual:
            if key in row:
                assert actual[key] == plain(row[key]), f"{case.name} {row['source_name']} {key}"
                case.comparison.count += 1


def scene_named(card: str, file: str) -> str:
    """The `{group}` that a card finds in the name of an image or of a mask, in any of its layouts.

    A pattern without a suffix also fits names with one, so the shortest group is the scene.
    """
    texts = [pattern.text for variant in CARDS[card].variants for pattern in variant.layout.patterns()]
    found = [PathPattern(text.rpartition("/")[2]).match(file) for text in texts]
    groups = {values["group"] for values in found if values is not None}
    assert groups, f"no pattern of {card} fits {file}: {texts}"
    return min(groups, key=len)


def check_label_colours(case: Case) -> None:
    """Classes of a colour-coded mask; what no tile covers holds 255."""
    script = case.meta["script"]
    stated = re.search(r"tiled (\d+)/(\d+)", case.meta.get("description", ""))
    assert stated or "clip" in case.meta, f"{case.name}: the tiling is described in an unknown way"
    tile, stride = map(int, stated.groups()) if stated else (case.meta["clip"], case.meta["stride"])
    image = case.tensors["rgb"].numpy().transpose(2, 0, 1)
    expected = case.tensors["label"]
    covered = np.full(expected.shape, False)
    for window in published_grid(script, tile, stride).windows(*expected.shape):
        covered[window.row : window.row + window.height, window.col : window.col + window.width] = True
    name, values = published(script)
    labels, rule = CARDS[name].choose_labels(None), CARDS[name].choose_rule(RULE)
    assert rule.ignore_unknown
    table = LabelTable(labels.label_map, len(labels.classes), unknown=rule.unknown_label)
    stored = np.vectorize(values.__getitem__)(table.indices(image, None, name=case.name))
    case.close("label", torch.from_numpy(np.where(covered, stored, 255)), expected, rtol=0.0, atol=0.0)


def check_metrics(case: Case) -> None:
    """Scores of all classes and their means over the images of a split."""
    num_classes = int(case.meta["num_classes"])
    shift = 1 if case.meta["reduce_zero_label"] else 0
    stored = {value + shift: value for value in range(num_classes)} | ({0: 255} if shift else {}) | {255: 255}
    table = LabelTable(LabelMap(values=stored), num_classes)
    confusion = ConfusionMatrix(num_classes)
    for prediction, raw in zip(case.sequence("pred"), case.sequence("gt_raw"), strict=True):
        confusion.update(prediction, torch.from_numpy(table.indices(raw.numpy()[None], None, name=case.name)))
    per_class, means = mmseg_scores(scores(confusion.counts[:-1], [str(i) for i in range(num_classes)]))
    for key, expected in case.meta["result"].items():
        check_values(case, key, per_class[key], expected)
    for key in means:
        if key in case.meta:
            check_values(case, key, [means[key]], [case.meta[key]])


def check_values(case: Case, key: str, actual: Iterable[float | None], expected: Iterable[float | None]) -> None:
    """Values of classes; None where the score is undefined."""
    ours, theirs = list(actual), list(expected)
    theirs = [None if value is None or math.isnan(value) else value for value in theirs]
    assert [value is None for value in ours] == [value is None for value in theirs], f"{case.name} {key}: {ours}"
    known = [[v for v in values if v is not None] for values in (ours, theirs)]
    case.close(key, *(torch.tensor(values, dtype=torch.float64) for values in known), "result")


def check_schedule(case: Case) -> None:
    """The rate of every listed module in every listed iteration."""
    hook = case.meta["hook"]
    for key, value in (("policy", "poly"), ("by_epoch", False), ("warmup_by_epoch", False), ("warmup", "linear")):
        hook.expect(key, value, None)
    warmup, steps, start = (hook.get(key) for key in ("warmup", "warmup_iters", "warmup_ratio"))
    schedule = ScheduleConfig(
        warmup_steps=steps if warmup else 0,
        warmup_start=start if warmup else 1.0,
        warmup_style="mmcv",
        decay="poly",
        power=hook["power"],
        min_lr=hook["min_lr"],
    )
    stated = re.search(r"of (\d{3,})", case.meta.get("description", ""))
    total = int(case.meta.get("total_iters", stated[1] if stated else 40000))
    for row in case.meta["rows"]:
        for module, rate in row["lr"].items():
            actual = lr_at(schedule, case.meta["base_lr"][module], row["iter"], total)
            case.close(f"{module} in iteration {row['iter']}", actual, rate, "lr")


DRIVERS: Drivers = {
    "tiling": check_tiling,
    "label_colours": check_label_colours,
    "metrics": check_metrics,
    "lr_schedule": check_schedule,
}
