"""Choose the windows that are most worth labeling: uncertain, and on request of rare classes or unlike labeled ones."""

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely
import torch
from numpy.typing import NDArray

from rsseg.data.index import SegmentationIndex, is_dataset
from rsseg.datasets.prepare.add import Chip, write_chip, write_chip_classes
from rsseg.errors import DataError, UsageError
from rsseg.fields import Result
from rsseg.files import check_outputs
from rsseg.inference.blend import CLASSES_ONLY
from rsseg.inference.features import Reference, with_features
from rsseg.inference.tiling import Span
from rsseg.raster import RasterInfo, Window
from rsseg.scene.batch import find_scenes
from rsseg.scene.blocks import (
    LEAST_BLOCK,
    Blocks,
    Image,
    Progress,
    dataset_images,
    load_reference,
    measure_blocks,
)
from rsseg.scene.memory import PreparedNetwork
from rsseg.scene.options import SceneOptions
from rsseg.scene.plan import prepare_scene
from rsseg.task import Task
from rsseg.vector.grid import Grid, reproject
from rsseg.vector.write import outline_style, write_shapes

FACTORS = ("rarity", "distance")
"""Factors of a score besides entropy."""
_HIGH, _FAR, _MUCH = 0.75, 1.5, 0.2
"""Reasons are named above this quantile of the entropy, this multiple of the median distance, this share of a class."""


class Choice(NamedTuple):
    """A block to label.

    block: position in `Blocks`
    score: what the choice went by; see `choose_blocks`
    distance: to the nearest labeled or earlier chosen block, in units of the median distance to the labeled ones
    rarity: mean weight of its predicted classes, 1 for the rarest class
    """

    block: int
    score: float
    distance: float
    rarity: float
    reason: str


def choose_blocks(
    blocks: Blocks,
    reference: Reference,
    count: int,
    *,
    classes: Sequence[str],
    per_image: int | None = None,
    factors: Collection[str] = (),
) -> list[Choice]:
    """Greedy choice of the highest score: entropy, times the factors.

    After each choice the distances are updated, as in a greedy k-centre cover of the feature space.

    Args:
        blocks: candidates.
        reference: features of the labeled images.
        count: blocks to choose.
        classes: their names, for the reasons.
        per_image: at most this many of one image or scene.
        factors: `rarity` of the predicted classes, `distance` to what is known. None by default: in a replay on three
            datasets they gained nothing, and cost much on one (docs/results-suggest.md).

    Raises:
        DataError: there is no candidate.
    """
    if not len(blocks):
        raise DataError(
            "no block has enough data, so none is left to choose from. Give other scenes or a smaller --block."
        )
    own = torch.from_numpy(blocks.features)
    known = reference.distances(own).numpy().astype(np.float64)
    median = max(float(np.median(known)), 1e-12)
    distance = known / median
    standard = reference.standardized(own).numpy() / math.sqrt(own.shape[1])
    shares = blocks.shares
    weights = _rarity(shares)
    rarity = shares @ weights
    base = blocks.entropy * rarity if "rarity" in factors else blocks.entropy
    high = float(np.quantile(blocks.entropy, _HIGH))
    groups = [blocks.images[i].group for i in blocks.image.tolist()]
    taken: dict[str, int] = {}
    open_ = np.ones(len(blocks), np.bool_)
    chosen: list[Choice] = []
    while len(chosen) < count and open_.any():
        score = base * distance if "distance" in factors else base
        best = int(np.argmax(np.where(open_, score, -1.0)))
        rare = [
            f"{share:.0%} {name}"
            for name, share, weight in zip(classes, shares[best].tolist(), weights.tolist(), strict=True)
            if share >= _MUCH and weight >= np.median(weights[shares.max(0) > 0])
        ]
        reasons = ["the model is unsure"] if blocks.entropy[best] >= high else []
        reasons += ["unlike the labeled images and the other choices"] if distance[best] >= _FAR else []
        reasons += [f"rare class: {', '.join(rare)}"] if rare else []
        reason = "; ".join(reasons) or "best of the rest"
        chosen.append(Choice(best, float(score[best]), float(distance[best]), float(rarity[best]), reason))
        open_[best] = False
        taken[groups[best]] = taken.get(groups[best], 0) + 1
        if per_image is not None and taken[groups[best]] >= per_image:
            open_ &= np.array([group != groups[best] for group in groups], np.bool_)
        distance = np.minimum(distance, np.linalg.norm(standard - standard[best], axis=1) / median)
    return chosen


def _rarity(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """(K,): one over the square root of the share of each class in all blocks, 1 for the rarest one predicted."""
    found = shares.mean(0)
    weights = 1 / np.sqrt(np.maximum(found, 1e-4))
    return np.asarray(weights / weights[found > 0].max().clip(1e-12))


class Suggestion(Result):
    """A window to label."""

    rank: int
    scene: str
    row: int
    col: int
    height: int
    width: int
    score: float
    uncertainty: float
    """Mean entropy of the predicted probabilities, 0..1."""
    distance: float
    """In the features of the network to the nearest labeled window or earlier suggestion; 1 is the median of all
    blocks to the labeled ones."""
    rarity: float
    """Mean weight of the predicted classes; 1 for the rarest."""
    reason: str
    shares: dict[str, float]
    """Predicted share of each class."""


def suggest(
    model: Path,
    prepared: PreparedNetwork,
    names: Sequence[str],
    output: Path,
    options: SceneOptions,
    *,
    count: int = 50,
    block: int = 256,
    per_image: int | None = None,
    factors: Collection[str] = (),
    chips: Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> list[Suggestion]:
    """Write the windows to label next as polygons.

    Args:
        model: run folder or model file.
        prepared: its network.
        names: scenes as for `predict`, or a prepared dataset, whose images without a mask are candidates.
        output: GeoPackage, in the coordinate system of the first scene.
        options: how the scenes are read and predicted.
        count: number of windows.
        block: side of a window in pixels.
        per_image: at most this many of one scene.
        factors: of the score besides entropy; see `choose_blocks`.
        chips: folder for the pixels of the windows, with predicted masks to correct.
        overwrite: replace the output.

    Raises:
        UsageError: the output exists or is no GeoPackage, `block` is too small, a factor is unknown, the engine is not
            torch.
        DataError: nothing to choose from, a scene is missing or lacks bands.
        WeightsError: the model has no features and its dataset is missing.
    """
    if output.suffix.lower() != ".gpkg":
        raise UsageError(f"{output}: suggestions are written to a GeoPackage. Give a name that ends in .gpkg.")
    if block < LEAST_BLOCK:
        raise UsageError(f"--block {block}: features need windows of at least {LEAST_BLOCK} pixels.")
    if not set(factors) <= set(FACTORS):
        raise UsageError(f"--factors {','.join(factors)}: write rarity, distance or rarity,distance.")
    check_outputs([("--output", output)], [model, *names], overwrite=overwrite)
    if chips is not None and chips.exists() and any(chips.iterdir()):
        raise UsageError(f"{chips}: --chips exists already. Choose another folder.")
    prepared = replace(prepared, network=with_features(prepared.network, "suggest"))
    task = prepared.network.task
    images = _open_images(names, task, options)
    reference = load_reference(model, prepared, progress=progress)
    blocks = measure_blocks(prepared, images, block, progress=progress)
    choices = choose_blocks(blocks, reference, count, classes=task.class_names, per_image=per_image, factors=factors)
    found = []
    for rank, choice in enumerate(choices, start=1):
        number = choice.block
        row, col, height, width = blocks.windows[number].tolist()
        found.append(
            Suggestion(
                rank=rank,
                scene=blocks.images[blocks.image[number]].file,
                row=row,
                col=col,
                height=height,
                width=width,
                score=choice.score,
                uncertainty=float(blocks.entropy[number]),
                distance=choice.distance,
                rarity=choice.rarity,
                reason=choice.reason,
                shares=dict(zip(task.class_names, blocks.shares[number].tolist(), strict=True)),
            )
        )
    used = [int(blocks.image[choice.block]) for choice in choices]
    _write(output, found, [blocks.infos[i] for i in used], task)
    if chips is not None:
        for suggestion, number in zip(found, used, strict=True):
            _write_chip(prepared, blocks.images[number], suggestion, chips)
        write_chip_classes(chips, task)
    return found


def _open_images(names: Sequence[str], task: Task, options: SceneOptions) -> list[Image]:
    """Scenes, or the unlabeled images of a prepared dataset.

    Raises:
        DataError: the dataset has no unlabeled image, or several files per image.
    """
    if len(names) == 1 and is_dataset(Path(names[0])):
        index = SegmentationIndex.load(Path(names[0]))
        items = [item for item in index.items if item.mask is None]
        if not items:
            raise DataError(
                f"{names[0]}: every image has a mask, so none is left to choose from. Give scenes, or a dataset with "
                "unlabeled images."
            )
        return dataset_images(index, items, task.bands, options)
    return [Image(scene, options, scene) for scene in find_scenes(names)]


def _write(output: Path, found: Sequence[Suggestion], infos: Sequence[RasterInfo], task: Task) -> None:
    grids = [Grid(info) for info in infos]
    crs, shapes = grids[0].crs, []
    for suggestion, grid in zip(found, grids, strict=True):
        s = suggestion
        corners = [(0, 0), (0, s.height), (s.width, s.height), (s.width, 0)]
        ring = np.array([(s.col + x, s.row + y) for x, y in corners], np.float64)
        ground = grid.to_ground(ring)
        if crs is not None and grid.crs is not None and grid.crs != crs:
            ground = reproject(ground, grid.crs, crs, s.scene)
        shapes.append(shapely.Polygon(ground))
    names = ("rank", "score", "reason", "uncertainty", "distance", "rarity", "scene", "row", "col", "height", "width")
    fields = {name: np.array([getattr(s, name) for s in found]) for name in names}
    fields |= {f"share_{name}": np.array([s.shares[name] for s in found]) for name in task.class_names}
    write_shapes(output, shapes, crs, fields, layer="suggestions", style=outline_style("rank"))


def _write_chip(prepared: PreparedNetwork, image: Image, suggestion: Suggestion, folder: Path) -> None:
    """Cut a window with its predicted mask."""
    scene = prepare_scene(prepared, image.file, None, image.options)
    window = Window(suggestion.row, suggestion.col, suggestion.height, suggestion.width)
    with scene.open() as raster:
        pixels, valid = raster.read(window)
        info = raster.info
    task, network = scene.network.task, scene.network
    scaled = task.scaled(np.ascontiguousarray(pixels.transpose(1, 2, 0)), valid, network.fill).transpose(2, 0, 1)
    rows, cols = Span(0, window.height), Span(0, window.width)
    classes = network.logits([scaled], scene.compute)[0].decide(rows, cols, CLASSES_ONLY).classes
    name = f"{suggestion.rank:03d}_{Path(image.file).stem}_{window.row:05d}_{window.col:05d}.tif"
    write_chip(folder, name, Chip(pixels, valid, classes, info, window), task, source=image.file)
