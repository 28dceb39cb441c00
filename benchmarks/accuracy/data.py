"""The datasets of the table, prepared by rsseg itself; where a source is absent, the settings on it are left out."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np

from rsseg.cli import run
from rsseg.data.index import SegmentationIndex

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PARTS = {5: (5,), 10: (1, 5), 20: (1, 3, 5, 7), 45: range(1, 10)}
"""Labeled images of Dubai -> which of the nine parts of each of the five training tiles they are."""


def prepare(name: str, source: Path | None, folder: Path, *, half: bool) -> Path | None:
    """A dataset of the table, made once.

    Args:
        name: a key of `SOURCES`.
        source: folder that holds `dubai`, `l8biome_cloud` and `l8biome_cloud_uda`.
        folder: where prepared datasets are kept.
        half: Dubai at half resolution.

    Returns:
        The prepared folder; None where the source is absent.
    """
    out = folder / (f"{name}-half" if half and name.startswith("dubai") else name)
    if (out / "digest.txt").is_file():
        return out
    make, where = SOURCES[name]
    if where is not None and (source is None or not (source / where).is_dir()):
        return None
    make(source / where if source is not None and where is not None else Path(), out, half)
    (out / "digest.txt").write_text(_digest(out))
    return out


def _demo(_: Path, out: Path, __: bool) -> None:
    _call("dataset", "prepare", "demo", "--out", str(out))


def _dubai(source: Path, out: Path, half: bool) -> None:
    if half:
        smaller = out.with_name(f"{out.name}-source")
        _halve(source, smaller)
        source = smaller
    suffix = "png" if half else "jpg"
    layout = ["--images", f"{{split}}/images/*.{suffix}", "--masks", "{split}/masks/*.png"]
    classes = ["--classes", str(EXAMPLES / "dubai-classes.yaml")]
    _call("dataset", "prepare", "folder", "--src", str(source), *classes, *layout, "--out", str(out))
    images = [item.image for item in SegmentationIndex.load(out).items if item.split == "train"]
    for count, parts in PARTS.items():
        chosen = [image for image in images if any(f"_part{part:03d}" in image for part in parts)]
        if len(chosen) != count:
            raise SystemExit(f"{source}: {len(chosen)} images are parts {list(parts)}, expected {count}")
        (out / f"labeled-{count}.txt").write_text("\n".join(chosen) + "\n")


def _dubai_uda(source: Path, out: Path, half: bool) -> None:
    lists = source / "splits"
    if half:
        smaller = out.with_name(f"{out.name}-source")
        _halve(source, smaller)
        source = smaller
    suffix = "png" if half else "jpg"
    splits = []
    for split, name in (
        ("train:desert", "uda_source_train"),
        ("val:desert", "uda_source_val"),
        ("unlabeled:town", "uda_target_unlabeled"),
        ("test:town", "uda_target_test"),
    ):
        file = out.with_name(f"{out.name}-{name}.txt")
        file.write_text((lists / f"{name}.txt").read_text().replace(".jpg", f".{suffix}"))
        splits += ["--split-list", f"{split}={file}"]
    layout = ["--images", f"*/images/*.{suffix}", "--masks", "*/masks/*.png", "--unlabeled", "unlabeled"]
    classes = ["--classes", str(EXAMPLES / "dubai-classes.yaml")]
    _call("dataset", "prepare", "folder", "--src", str(source), *classes, *layout, *splits, "--out", str(out))


def _l8biome_uda(source: Path, out: Path, _: bool) -> None:
    """Every fifth of the natural scenes is held out for validation, in the order of the number of their classes: most
    scenes have a single class, and validation on those alone tells no network from another."""
    masks = source / "source_rgb" / "masks"
    classes = {file.name: len(np.unique(cv2.imread(str(file), cv2.IMREAD_UNCHANGED))) for file in masks.glob("*.png")}
    names = sorted(classes, key=lambda name: (-classes[name], name))
    held = set(names[1::5])
    lists = {
        "train:natural": [f"source_rgb/images/{name}" for name in names if name not in held],
        "val:natural": [f"source_rgb/images/{name}" for name in names if name in held],
    }
    for split, folder in (
        ("unlabeled:infrared", "target_nirswirred_train"),
        ("test:infrared", "target_nirswirred_test"),
    ):
        lists[split] = [f"{folder}/images/{file.name}" for file in sorted((source / folder / "images").glob("*.png"))]
    splits = []
    for split, images in lists.items():
        file = out.with_name(f"{out.name}-{split.replace(':', '-')}.txt")
        file.write_text("\n".join(images) + "\n")
        splits += ["--split-list", f"{split}={file}"]
    layout = ["--images", "*/images/*.png", "--masks", "*/masks/*.png", "--unlabeled", "unlabeled"]
    classes = ["--classes", str(EXAMPLES / "l8biome-classes.yaml"), "--bands", "red,green,blue"]
    _call("dataset", "prepare", "folder", "--src", str(source), *classes, *layout, *splits, "--out", str(out))


def _l8biome(source: Path, out: Path, _: bool) -> None:
    layout = ["--images", "{split}/images/*.tif", "--masks", "{split}/masks/*.png"]
    bands = ["--bands", "blue,green,red,nir,swir1,swir2,cirrus,tir1"]
    classes = ["--classes", str(EXAMPLES / "l8biome-classes.yaml")]
    _call("dataset", "prepare", "folder", "--src", str(source), *classes, *layout, *bands, "--out", str(out))


SOURCES: Mapping[str, tuple[Callable[[Path, Path, bool], None], str | None]] = {
    "demo": (_demo, None),
    "dubai": (_dubai, "dubai"),
    "dubai-uda": (_dubai_uda, "dubai"),
    "l8biome": (_l8biome, "l8biome_cloud"),
    "l8biome-uda": (_l8biome_uda, "l8biome_cloud_uda"),
}


def _call(*arguments: str) -> None:
    if (code := run([*arguments, "--overwrite"])) != 0:
        raise SystemExit(f"rsseg {' '.join(arguments)} ended with exit code {code}")


def _halve(source: Path, out: Path) -> None:
    """Images averaged over 2 x 2 pixels, masks sampled; all as PNG."""
    for file in sorted([*source.glob("*/images/*.jpg"), *source.glob("*/masks/*.png")]):
        pixels = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        size = (pixels.shape[1] // 2, pixels.shape[0] // 2)
        how = cv2.INTER_NEAREST if file.parent.name == "masks" else cv2.INTER_AREA
        target = out / file.relative_to(source).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), cv2.resize(pixels, size, interpolation=how))


def _digest(root: Path) -> str:
    """SHA-256 of all images and masks of an index, with their splits and domains."""
    sha, index = hashlib.sha256(), SegmentationIndex.load(root)
    for item in index.items:
        sha.update(f"{item.image} {item.split} {item.domain}".encode())
        for file in (item.image, item.mask):
            sha.update(b"" if file is None else (index.root / file).read_bytes())
    return sha.hexdigest()
