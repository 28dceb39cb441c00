"""Draw the features of a vector file as masks of scenes, and collect what is wrong with them."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rsseg.datasets.class_file import classes_from, load_classes
from rsseg.datasets.measure import open_image
from rsseg.datasets.prepare.options import VectorOptions
from rsseg.datasets.prepare.stage import require_free_disk
from rsseg.datasets.prepare.tiles import TileMetadata, write_mask
from rsseg.errors import UsageError
from rsseg.raster import RasterInfo, Window
from rsseg.task import IGNORE_INDEX
from rsseg.vector.aoi import Region, read_region
from rsseg.vector.labels import Burning, Issue, SceneLabels, place_labels, read_features
from rsseg.vector.read import nearest

_STRIP_PIXELS = 1 << 24
"""Pixels that are drawn at a time."""


class Drawing:
    """The labels of a request, read and matched to classes; draws masks and collects what is wrong."""

    def __init__(self, options: VectorOptions) -> None:
        """Read labels and classes; raises `DataError` and `UsageError`."""
        self._options = options
        self.features = read_features(
            options.labels,
            options.layer,
            options.field,
            crs=options.labels_crs,
            split_field=options.split_field,
            width=options.width,
        )
        self.made_classes = options.classes is None
        self.classes = (
            classes_from(self.features.values, options.labels.stem, options.background)
            if options.classes is None
            else load_classes(options.classes)
        )
        names = [entry.name for entry in self.classes.classes]
        self._index, unvalued = self.features.classes(self.classes.attribute_values())
        self._fill = IGNORE_INDEX if options.background is None else _position(names, options.background, "background")
        self._priority = [_position(names, name, "priority") for name in options.priority]
        self._how = Burning(options.touched == "all", options.buffer, options.width)
        self._names = names
        self._issues = [*self.features.issues, *unvalued]
        self._drawn = np.zeros(len(self.features.fids), np.bool_)
        self._vanished = np.zeros(len(self.features.fids), np.bool_)
        self._pairs: dict[tuple[int, int], float] = {}

    def draw(self, image: Path | Sequence[Path], target: Path, bands: Sequence[str] | None = None) -> "Drawn":
        """Write the mask of a scene, strip by strip.

        Args:
            image: the scene, or one file per band.
            target: GeoTIFF of class indices on its grid, 255 where there is no label.
            bands: see `open_image`.
        """
        files = [image] if isinstance(image, Path) else list(image)
        with open_image(files, bands) as raster:
            info = raster.info
        labels = place_labels(self.features, self._index, info, self._how, self._priority)
        self._note(labels, info)
        region = self._extent(info)
        metadata = TileMetadata.of(info, None).for_masks([])
        metadata = dataclasses.replace(metadata, colormap=self._colors())
        labeled = False

        def strips() -> Iterable[tuple[Window, NDArray[np.uint8]]]:
            nonlocal labeled
            for window in _windows(info):
                pixels = labels.burn(window, fill=self._fill, touched=self._how.touched)
                if region is not None:
                    pixels[~region.mask(window)] = IGNORE_INDEX
                labeled = labeled or bool((pixels != IGNORE_INDEX).any())
                yield window, pixels

        require_free_disk(target.parent, info.height * info.width // 50)
        write_mask(target, info.height, info.width, metadata, strips())
        return Drawn(info, labels, labeled)

    def splits_within(self, labels: SceneLabels, window: Window) -> set[str]:
        """Values of the split attribute of the features in a window of a scene."""
        splits = self.features.splits or ()
        return {splits[feature] for feature in labels.within(window)} - {""}

    def counts(self) -> dict[str, int]:
        """Class -> features drawn in a scene."""
        found = np.bincount(self._index[self._drawn & (self._index >= 0)], minlength=256)
        return {name: int(count) for name, count in zip(self._names, found, strict=False)}

    def issues(self) -> list[Issue]:
        """Everything that is wrong with the labels, after all scenes are drawn."""
        features, usable = self.features, np.zeros(len(self.features.fids), np.bool_)
        usable[features.owner] = True
        usable &= self._index >= 0
        found = list(self._issues)
        gone = usable & self._vanished & ~self._drawn
        outside = usable & ~self._drawn & ~gone
        if features.splits is not None:
            unknown = usable & np.array([not split for split in features.splits], np.bool_)
            found.append(Issue("without a value in the split field", features.fids_of(unknown)))
        found.append(Issue("outside all scenes", features.fids_of(outside)))
        found.append(Issue(f"with nothing left after --buffer {self._options.buffer:g}", features.fids_of(gone)))
        for (lower, upper), shared in sorted(self._pairs.items(), key=lambda pair: -pair[1]):
            one, other = self._names_of(lower), self._names_of(upper)
            reason = f"overlap by {shared:.0f} pixels ({one} below {other}); the upper one is drawn"
            found.append(Issue(reason, (int(features.fids[lower]), int(features.fids[upper]))))
        counts = self.counts()
        missing = [n for n, count in counts.items() if not count and n != self._options.background]
        found = [issue for issue in found if issue.fids]
        if missing:
            found.append(Issue(f"no feature in any scene has the class {', '.join(missing)}", ()))
        return found

    def _names_of(self, feature: int) -> str:
        index = int(self._index[feature])
        return self._names[index] if index < len(self._names) else "ignored"

    def _note(self, labels: SceneLabels, info: RasterInfo) -> None:
        self._vanished[labels.vanished] = True
        self._drawn[labels.within(Window(0, 0, info.height, info.width))] = True
        one, other, shared = labels.overlaps()
        for lower, upper, pixels in zip(labels.owner[one], labels.owner[other], shared.tolist(), strict=True):
            pair = int(lower), int(upper)
            self._pairs[pair] = self._pairs.get(pair, 0.0) + pixels

    def _extent(self, info: RasterInfo) -> Region | None:
        if self._options.extent is None:
            return None
        return read_region(self._options.extent, info, layer=self._options.extent_layer, must_meet=False)

    def _colors(self) -> tuple[tuple[int, tuple[int, int, int]], ...]:
        own = [(i, entry.color) for i, entry in enumerate(self.classes.classes)]
        return (*own, (IGNORE_INDEX, (0, 0, 0)))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A scene with its mask."""

    info: RasterInfo
    labels: SceneLabels
    labeled: bool
    """Whether any pixel has a class."""


def _position(names: Sequence[str], name: str, option: str) -> int:
    if name not in names:
        raise UsageError(f"--{option} {name}: there is no such class; {nearest(name, names)}")
    return names.index(name)


def _windows(info: RasterInfo) -> Iterable[Window]:
    """Strips of whole blocks of the mask."""
    rows = max(_STRIP_PIXELS // info.width // 512, 1) * 512
    for row in range(0, info.height, rows):
        yield Window(row, 0, min(rows, info.height - row), info.width)
