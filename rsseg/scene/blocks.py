"""Class counts, entropy and features per block of images, summed in one pass of the predictor in bounded memory."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rsseg.checkpoint import find_model, read_header
from rsseg.config import SelectConfig
from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.data.sources import select_items
from rsseg.errors import DataError, UsageError, WeightsError
from rsseg.inference.blend import Tile, TileLogits
from rsseg.inference.features import REFERENCE_NAME, Reference, feature_backbone, window_cells, with_features
from rsseg.inference.machine import memory_errors
from rsseg.inference.predict import predict_tiles
from rsseg.inference.tiling import Panel, Span
from rsseg.inference.torch_network import TensorLogits
from rsseg.raster import RasterInfo
from rsseg.recipe import recipe_from_dict
from rsseg.scene.memory import OUT_OF_MEMORY, PreparedNetwork
from rsseg.scene.options import SceneOptions
from rsseg.scene.plan import prepare_scene
from rsseg.scene.predict import read_ahead
from rsseg.scene.source import read_tiles

Progress = Callable[[str, int, int], None]
"""Called with a file or the images in words, and the numbers of finished and of all tiles or images."""
LEAST_BLOCK = 64
_MOST_VALUES = 1 << 29
"""Feature values of all blocks in memory."""
_LEAST_VALID = 0.5
"""Share of a block that must have data."""
_MOST_REFERENCE = 400
"""Training images and held-out images that are read for the reference."""


@dataclass(frozen=True, eq=False)
class Image:
    """A file to predict, with the options to read it; images of one `group` count as one scene."""

    file: str
    options: SceneOptions
    group: str


@dataclass(frozen=True, eq=False)
class Blocks:
    """Statistics of blocks of images.

    images: their files
    infos: their grids
    image: int64 (n,), position in `images`
    windows: int64 (n, 4), row, column, height, width
    counts: int64 (n, K), predicted pixels of each class
    entropy: float64 (n,), mean over the valid pixels, 0..1
    features: float32 (n, C), means
    """

    images: tuple[Image, ...]
    infos: tuple[RasterInfo, ...]
    image: NDArray[np.int64]
    windows: NDArray[np.int64]
    counts: NDArray[np.int64]
    entropy: NDArray[np.float64]
    features: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.image)

    @property
    def shares(self) -> NDArray[np.float64]:
        """(n, K) share of each class."""
        return np.asarray(self.counts / np.maximum(self.counts.sum(1, keepdims=True), 1))


class _Part(NamedTuple):
    """Sums over the part of a tile that it keeps."""

    blocks: NDArray[np.int64]
    counts: NDArray[np.int64]
    entropy: NDArray[np.float64]
    features: NDArray[np.float32]
    cells: NDArray[np.float32]


def dataset_images(
    index: SegmentationIndex, items: Sequence[IndexItem], bands: Sequence[str], options: SceneOptions
) -> list[Image]:
    """Images of a dataset as files to predict; `bands` are the network's in the names of the dataset."""
    if joined := [item.image for item in items if "|" in item.image]:
        raise DataError(f"{index.root}: {joined[0]} has a file per band. Give the scenes as GeoTIFF or VRT instead.")
    if missing := [band for band in bands if band not in index.task.bands]:
        raise DataError(f"{index.root}: there is no band {missing[0]!r}; it has {', '.join(index.task.bands)}.")
    numbers = tuple(str(index.task.bands.index(band) + 1) for band in bands)
    own = {"bands": numbers, "nodata": index.nodata, "zero_collar": index.ignore_zero_collar}
    options = options.model_copy(update=own)
    return [Image(str(index.root / item.image), options, item.scene or item.image) for item in items]


def measure_blocks(
    prepared: PreparedNetwork,
    images: Sequence[Image],
    side: int,
    *,
    what: str = "images",
    progress: Progress = lambda *_: None,
) -> Blocks:
    """Predict images and summarize each block of their grids; blocks that are mostly without data are left out.

    Args:
        prepared: a network with features, see `with_features`.
        images: of any size; each is read once, in the memory of a prediction.
        side: of a block in pixels; those at the right and bottom are smaller.
        what: the images in words.
        progress: called after each tile of a single image, or after each of several images.

    Raises:
        DataError: an image is missing, damaged, or lacks bands.
        UsageError: too many blocks.
    """
    parts, infos, held = [], [], 0
    for number, image in enumerate(images):
        alone: Progress = progress if len(images) == 1 else lambda *_: None
        info, windows, counts, entropy, features = _measure_image(prepared, image, side, alone)
        if len(images) > 1:
            progress(f"predict {what}", number + 1, len(images))
        full = np.minimum(side, info.height) * np.minimum(side, info.width)
        kept = (counts.sum(1) >= _LEAST_VALID * full) & np.isfinite(features).all(1)
        infos.append(info)
        where = np.full(int(kept.sum()), number, np.int64)
        parts.append((where, windows[kept], counts[kept], entropy[kept], features[kept]))
        held += parts[-1][4].size
        if held > _MOST_VALUES:
            raise UsageError(
                f"--block {side}: too many blocks for the memory. Choose a larger --block or fewer scenes."
            )
    joined = [np.concatenate(values) for values in zip(*parts, strict=True)]
    return Blocks(tuple(images), tuple(infos), *joined)


def _measure_image(
    prepared: PreparedNetwork, image: Image, side: int, progress: Progress
) -> tuple[RasterInfo, NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float32]]:
    scene = prepare_scene(prepared, image.file, None, image.options)
    info, task = scene.info, scene.network.task
    rows, cols = (-(-length // side) for length in (info.height, info.width))
    channels = feature_backbone(prepared.network.segmenter).info.channels[-1]  # type: ignore[attr-defined]
    if rows * cols * channels > _MOST_VALUES:
        raise UsageError(f"{image.file}: too many blocks of {side} pixels. Choose a larger --block.")
    counts = np.zeros((rows * cols, task.num_classes), np.int64)
    entropy, cells = np.zeros(rows * cols), np.zeros(rows * cols, np.float32)
    features = np.zeros((rows * cols, channels), np.float32)
    done = 0
    with memory_errors(OUT_OF_MEMORY), scene.open() as raster:
        reader = read_ahead(read_tiles([raster], scene.panels, scene.network, region=scene.region))
        with closing(reader) as tiles:
            for _, part in predict_tiles(scene.network, tiles, _summary(scene.panels, side, cols), scene.compute):
                done += 1
                progress(image.file, done, scene.tiles)
                if part is not None:
                    counts[part.blocks] += part.counts
                    entropy[part.blocks] += part.entropy
                    features[part.blocks] += part.features
                    cells[part.blocks] += part.cells
    top, left = (axis * np.int64(side) for axis in np.divmod(np.arange(rows * cols), cols))
    height, width = np.minimum(side, info.height - top), np.minimum(side, info.width - left)
    windows = np.stack([top, left, height, width], axis=1)
    with np.errstate(invalid="ignore"):
        features /= cells[:, None]
    return info, windows, counts, entropy / np.maximum(counts.sum(1), 1), features


def _summary(panels: Sequence[Panel], side: int, columns: int) -> Callable[[Tile, TileLogits], _Part]:
    """Sums over the blocks that the kept part of a tile touches; `columns` is the number of blocks in a row."""

    def summarize(tile: Tile, logits: TileLogits) -> _Part:
        assert isinstance(logits, TensorLogits)  # for the type checker: the network has a tap
        assert logits.features is not None
        panel = panels[tile.panel]
        top, left = panel.plan.rows.origins[tile.row], panel.plan.cols.origins[tile.col]
        rows, wide = panel.plan.rows.kept[tile.row].moved(-top), panel.plan.cols.kept[tile.col]
        # Columns beyond those of the panel belong to its neighbours.
        cols = Span(max(wide.start, panel.kept.start), min(wide.stop, panel.kept.stop)).moved(-left)
        top_block, left_block = (top + rows.start) // side, (panel.left + left + cols.start) // side
        block_row = (np.arange(rows.start, rows.stop) + top) // side - top_block
        block_col = (np.arange(cols.start, cols.stop) + panel.left + left) // side - left_block
        shape = int(block_row[-1]) + 1, int(block_col[-1]) + 1
        count, classes = shape[0] * shape[1], logits.num_classes
        histogram, entropy = np.zeros(count * classes, np.int64), np.zeros(count)
        for span, values in logits.bands(rows):
            kept = values[..., cols.area].float()
            highest = kept.max(0).indices.cpu().numpy()
            unsure = _entropy(kept).cpu().numpy()
            place = block_row[span.within(rows.start), None] * shape[1] + block_col
            good = slice(None) if tile.valid is None else tile.valid[span.area, cols.area]
            histogram += np.bincount((place * classes + highest)[good].ravel(), minlength=len(histogram))
            entropy += np.bincount(place[good].ravel(), unsure[good].ravel(), minlength=count)
        owner = torch.from_numpy(_owners(logits, tile, rows, cols, block_row, block_col, shape[1]))
        flat = logits.features.flatten(1).T
        owner = owner.to(flat.device).flatten()
        sums = flat.new_zeros(count + 1, flat.shape[1]).index_add_(0, owner, flat)[:count]
        cells = torch.bincount(owner, minlength=count + 1)[:count].float()
        blocks = (np.arange(shape[0])[:, None] + top_block) * columns + np.arange(shape[1]) + left_block
        return _Part(
            blocks.ravel().astype(np.int64),
            histogram.reshape(count, classes),
            entropy,
            sums.cpu().numpy(),
            cells.cpu().numpy(),
        )

    return summarize


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """(K, n, w) -> (n, w): entropy of the probabilities, 0..1."""
    if len(logits) == 1:
        return torch.zeros_like(logits[0])
    total = logits.logsumexp(0)
    return (total - (logits.softmax(0) * logits).sum(0)) / math.log(len(logits))


def _owners(
    logits: TensorLogits,
    tile: Tile,
    rows: Span,
    cols: Span,
    block_row: NDArray[np.int64],
    block_col: NDArray[np.int64],
    width: int,
) -> NDArray[np.int64]:
    """int64 (h, w): block of the centre of each cell of the feature map; one past the last for those outside."""
    assert logits.features is not None
    height_cells, width_cells = logits.features.shape[1:]
    y = ((np.arange(height_cells) + 0.5) * (logits.full[0] / height_cells)).astype(np.int64)
    x = ((np.arange(width_cells) + 0.5) * (logits.full[1] / width_cells)).astype(np.int64)
    inside = (((y >= rows.start) & (y < rows.stop))[:, None]) & ((x >= cols.start) & (x < cols.stop))
    y, x = y.clip(rows.start, rows.stop - 1), x.clip(cols.start, cols.stop - 1)
    owner = block_row[y - rows.start][:, None] * width + block_col[x - cols.start]
    if tile.valid is not None:
        inside &= tile.valid[y][:, x]
    return np.where(inside, owner, (int(block_row[-1]) + 1) * width)


def load_reference(model: Path, prepared: PreparedNetwork, *, progress: Progress = lambda *_: None) -> Reference:
    """Features of the model's training images, from the file beside it, which is made from the dataset if missing.

    Raises:
        WeightsError: there is neither such a file nor the dataset.
    """
    file = find_model(model).with_name(REFERENCE_NAME)
    if file.is_file():
        reference = Reference.load(file)
        if reference.model == prepared.model:
            return reference
    try:
        reference = _make_reference(find_model(model), prepared, progress)
    except DataError as error:
        raise WeightsError(
            f"{model}: has no features of its training images ({file.name}), and they cannot be computed: {error}"
        ) from None
    reference.save(file)
    return reference


def add_judge(model: Path, prepared: PreparedNetwork, options: SceneOptions) -> PreparedNetwork:
    """Let the network also judge how near features are to those of the model's training images.

    Raises:
        UsageError: another engine than torch, blending or test-time augmentation.
        WeightsError: see `load_reference`.
    """
    if options.blend != "crop" or options.tta != "none":
        raise UsageError("--applicability is computed per tile. Use it with --blend crop and --tta none.")
    prepared = replace(prepared, network=with_features(prepared.network, "--applicability"))
    reference = load_reference(model, prepared)
    return replace(prepared, network=replace(prepared.network, judge=reference.applicability))  # type: ignore[type-var]


def _make_reference(model: Path, prepared: PreparedNetwork, progress: Progress) -> Reference:
    network = with_features(prepared.network, "the reference")
    recipe = recipe_from_dict(read_header(model).recipe, str(model))
    cells = window_cells(network.segmenter)
    side = max(cells * feature_backbone(network.segmenter).info.strides[-1], LEAST_BLOCK)

    def features(select: SelectConfig, split: str) -> torch.Tensor:
        index = SegmentationIndex.load(select.path or recipe.data.path)
        items = [i for i in select_items(index, select, split=split, seed=recipe.seed) if i.mask is not None]
        step = max(-(-len(items) // _MOST_REFERENCE), 1)
        bands = select.bands or (recipe.data.bands or prepared.network.task.bands)
        images = dataset_images(index, items[::step], bands, SceneOptions())
        if not images:
            raise DataError(f"{index.root}: no image of the split {split!r} has a mask.")
        blocks = measure_blocks(prepared, images, side, what=f"{split} images", progress=progress)
        if not len(blocks):
            raise DataError(f"{index.root}: the split {split!r} has no image with data.")
        return torch.from_numpy(blocks.features)

    streams = recipe.data.streams
    select = next((streams[name] for name in ("labeled", "source") if name in streams), SelectConfig())
    reference = Reference.of(features(select, "train"), cells=cells, model=prepared.model)
    try:
        return reference.with_threshold(features(recipe.data.val or SelectConfig(), "val"), "validation images")
    except DataError:  # without validation images the training windows judge one another
        return reference.with_threshold(reference.vectors, "training images")
