"""Rasterizes labels of a GeoPackage onto the tiles of a scene, against `rasterio.features.rasterize` on the same tiles.

    python benchmarks/rasterize.py [--polygons 100000] [--side 20000] [--tile 1024] [--rounds 3]

Both sides read the same GeoPackage, look polygons up in an index, and burn them tile by tile; the results are compared
pixel by pixel. `prepare` is the whole path of `rsseg dataset prepare vectors` for the labels of one scene: reading,
placing, finding overlaps, burning and writing the mask. Processor seconds; each side in a process of its own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyogrio
import rasterio
import shapely
from rasterio.features import rasterize
from rasterio.transform import Affine, from_origin

from rsseg.raster import Raster, Window
from rsseg.vector.labels import Burning, place_labels, read_features

CRS = "EPSG:25832"
NAMES = ("field", "forest", "water", "road", "building")
GSD = 0.5


def make_source(folder: Path, polygons: int, side: int) -> None:
    """A sparse scene, and star-shaped polygons of 12 to 60 corners in it, some with a hole."""
    rng = np.random.default_rng(1)
    place = from_origin(500_000, 5_700_000, GSD, GSD)
    profile = {"driver": "GTiff", "height": side, "width": side, "count": 1, "dtype": "uint8", "crs": CRS}
    with rasterio.open(folder / "scene.tif", "w", transform=place, sparse_ok=True, tiled=True, **profile):
        pass
    mean = side / np.sqrt(polygons)
    shapes = []
    for corners, share in ((12, 0.6), (24, 0.3), (60, 0.1)):
        count = round(polygons * share)
        angle = np.linspace(0, 2 * np.pi, corners, endpoint=False)
        radius = rng.uniform(0.25, 0.6, (count, corners)) * mean * rng.uniform(0.3, 1.0, (count, 1))
        centre = rng.uniform(0, side, (count, 2))
        ring = centre[:, None] + radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        ground = np.stack([500_000 + ring[..., 0] * GSD, 5_700_000 - ring[..., 1] * GSD], axis=-1)
        shapes.append(shapely.polygons(ground))
    geometry = np.concatenate(shapes)
    pyogrio.raw.write(
        folder / "labels.gpkg", shapely.to_wkb(geometry), [np.array(NAMES, object)[rng.integers(0, 5, len(geometry))]],
        ["class"], layer="labels", geometry_type="Polygon", crs=CRS,
    )  # fmt: skip


def windows(side: int, tile: int) -> list[Window]:
    starts = range(0, side, tile)
    return [Window(r, c, min(tile, side - r), min(tile, side - c)) for r in starts for c in starts]


def plain(source: Path, tile: int) -> list[int]:
    """What a script does: read, index, and per tile the polygons in the order of the file."""
    with rasterio.open(source / "scene.tif") as file:
        side, place = file.height, file.transform
    _, _, wkb, (names,) = pyogrio.raw.read(source / "labels.gpkg", columns=["class"])
    shapes, values = shapely.from_wkb(wkb), np.array([NAMES.index(name) for name in names])
    tree, sums = shapely.STRtree(shapes), []
    for row, col, height, width in windows(side, tile):
        left, top = place * (col, row)
        right, bottom = place * (col + width, row + height)
        found = np.sort(tree.query(shapely.box(left, bottom, right, top)))
        burnt = zip(shapes[found], values[found].tolist(), strict=True)
        here = place * Affine.translation(col, row)
        pixels = rasterize(burnt, (height, width), fill=255, transform=here, dtype="uint8") if len(found) else None
        sums.append(0 if pixels is None else checksum(pixels))
    return sums


def ours(source: Path, tile: int) -> list[int]:
    features = read_features(source / "labels.gpkg", None, "class")
    classes, _ = features.classes({name: i for i, name in enumerate(NAMES)})
    with Raster(source / "scene.tif") as raster:
        info = raster.info
    labels = place_labels(features, classes, info, Burning())
    sums = []
    for window in windows(info.height, tile):
        pixels = labels.burn(window, fill=255)
        sums.append(0 if (pixels == 255).all() else checksum(pixels))
    return sums


def checksum(pixels: np.ndarray) -> int:
    return zlib.crc32(pixels)


def whole(source: Path, tile: int) -> list[int]:
    from rsseg.datasets.prepare.options import PrepareOptions
    from rsseg.datasets.prepare.vectors import Drawing

    del tile
    classes = source / "classes.yaml"
    entries = "\n".join(f"  - {{name: {name}, color: '#{i:02x}0000'}}" for i, name in enumerate(NAMES))
    classes.write_text(f"name: bench\nclasses:\n{entries}\n", encoding="utf-8")
    vectors = {"labels": source / "labels.gpkg", "field": "class", "classes": classes}
    drawing = Drawing(PrepareOptions(src=source, out=source / "out", vectors=vectors).vectors)
    drawing.draw(source / "scene.tif", source / "mask.tif")
    return []


KINDS = {"rasterio": plain, "rsseg": ours, "prepare": whole}


def measured(kind: str, source: Path, tile: int) -> dict[str, object]:
    command = [sys.executable, __file__, "--run", kind, str(source), "--tile", str(tile)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(answer.stdout.splitlines()[-1])


def run_one(kind: str, source: Path, tile: int) -> None:
    started = time.process_time()
    sums = KINDS[kind](source, tile)
    seconds = time.process_time() - started
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    print(json.dumps({"seconds": seconds, "mb": peak, "sums": sums}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--polygons", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", nargs=2, metavar=("KIND", "SOURCE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run_one(options.run[0], Path(options.run[1]), options.tile)
        return
    with tempfile.TemporaryDirectory() as name:
        source = Path(name)
        make_source(source, options.polygons, options.side)
        runs: dict[str, list[dict[str, object]]] = {}
        for _ in range(options.rounds):
            for kind in KINDS:
                runs.setdefault(kind, []).append(measured(kind, source, options.tile))
    print(
        f"{options.polygons} polygons, {options.side} x {options.side}, tiles of {options.tile}, median of "
        f"{options.rounds}:"
    )
    base = statistics.median(run["seconds"] for run in runs["rasterio"])
    for kind, found in runs.items():
        seconds, peak = statistics.median(run["seconds"] for run in found), max(run["mb"] for run in found)
        print(f"  {kind:9} {seconds:7.2f} s  {seconds / base:5.2f}x the time of rasterio  peak {peak:5.0f} MB")
    print(f"  same pixels: {runs['rasterio'][0]['sums'] == runs['rsseg'][0]['sums']}")


if __name__ == "__main__":
    main()
