"""What distances between images tell: losses between domains, errors within a scene; what temperatures mend; and what
the layers cost.

    python -m benchmarks.economy gap --data DATA --weights FILE     # DATA: prepared demo, dubai-half, l8biome-uda
    python -m benchmarks.economy trust --data DATA --weights FILE
    python -m benchmarks.economy calibration --models CELLS    # OUTPUT/cells of benchmarks.accuracy
    python -m benchmarks.economy long --data DATA --weights FILE    # DATA: OUTPUT/data of benchmarks.accuracy
    python -m benchmarks.economy page docs/results-trust.md
    python -m benchmarks.economy speed --side 4000

Trainings are plain and, but for those of `long`, short; they and all results are kept in `--out`, and are not repeated.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyogrio
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio.transform import Affine

from benchmarks.accuracy.table import PROFILES, SETTINGS
from benchmarks.economy_page import Record, page
from benchmarks.suggest import Setting, recipe_of
from rsseg.config import SelectConfig
from rsseg.data.dataset import SampleReader
from rsseg.data.index import IndexItem, SegmentationIndex
from rsseg.evaluation.gap import BACKBONE, dataset_gap
from rsseg.evaluation.model import DetailOptions
from rsseg.evaluation.model_file import evaluate_model
from rsseg.evaluation.points import assess_points
from rsseg.files import append_line, write_json
from rsseg.recipe import load_recipe
from rsseg.scene.batch import prepare_for
from rsseg.scene.options import SceneOptions
from rsseg.scene.plan import prepare_scene
from rsseg.scene.predict import predict_prepared
from rsseg.scene.suggest import suggest
from rsseg.training.progress import Progress
from rsseg.training.run import train

DATASETS = ("demo", "dubai-half", "l8biome-uda")
STEPS, CROP, BATCH, RATE = 150, 96, 4, 3e-3
TRUSTED = (("demo", "north", "south"), ("dubai-half", "tile1", "tile2"), ("l8biome-uda", "natural", "infrared"))
"""Dataset, domain of the training, domain of the scenes."""
LONG_RECIPE, LONG_SETTINGS = "supervised-small", ("dubai-10", "dubai-45", "l8biome-rgb")


def domain_of(item: IndexItem) -> str | None:
    """The dataset's domain, or the large tile that an image of Dubai was cut from: five of seven, to save time."""
    found = re.search(r"(tile[12357])_", item.image)
    return item.domain or (found[1] if found else None)


def domains(data: Path, work: Path) -> dict[tuple[str, str], Path]:
    """Each domain as a dataset of its own: every third labeled image tests, the others train."""
    found = {}
    for name in DATASETS:
        if not (data / name / "rsseg-index.json").is_file():
            continue
        index = SegmentationIndex.load(data / name)
        groups: dict[str, list[IndexItem]] = {}
        for item in sorted(index.items, key=lambda item: item.image):
            if item.mask is not None and (domain := domain_of(item)) is not None:
                groups.setdefault(domain, []).append(item)
        for domain, items in sorted(groups.items()):
            folder = work / f"{name}-{domain}"

            def moved(file: str | None, folder: Path = folder, root: Path = index.root) -> str | None:
                return None if file is None else os.path.relpath(root / file, folder)

            own = tuple(
                item.model_copy(
                    update={
                        "image": moved(item.image),
                        "mask": moved(item.mask),
                        "split": "test" if number % 3 == 2 else "train",
                    }
                )
                for number, item in enumerate(items)
            )
            index.model_copy(update={"items": own}).save(folder)
            found[name, domain] = folder
    return found


def model_of(folder: Path, weights: Path) -> Path:
    """The network of a domain, trained once."""
    model = folder / "model.txt"
    if not model.is_file():
        listed = folder / "labeled.txt"
        items = SegmentationIndex.load(folder).items
        listed.write_text("".join(f"{item.image}\n" for item in items if item.split == "train"), encoding="utf-8")
        setting = Setting(str(folder), None, BACKBONE, str(weights), 0, 0, STEPS, CROP, BATCH)
        recipe = recipe_of(setting, listed, 0)
        main = recipe.optimizers["main"].model_copy(update={"lr": RATE})
        data = recipe.data.model_copy(update={"val": SelectConfig(split="test")})
        recipe = recipe.model_copy(update={"data": data, "optimizers": {"main": main}})
        model.write_text(str(train(recipe, output=folder / "runs", progress=Progress()).model), encoding="utf-8")
    return Path(model.read_text(encoding="utf-8"))


def measure_gaps(data: Path, weights: Path, out: Path) -> None:
    """Scores of each network on each domain of its dataset, and the distance of each pair of domains."""
    folders = domains(data, out / "domains")
    done = {(r["data"], r["first"], r["second"]) for r in read(out, "gap")}
    for (name, first), (other, second) in combinations(folders, 2):
        if name != other or (name, first, second) in done:
            continue
        pair = folders[name, first], folders[name, second]
        models = [model_of(folder, weights) for folder in pair]
        scores = [[miou_of(model, folder) for folder in pair] for model in models]
        found = dataset_gap(*pair, backbone=BACKBONE, weights=str(weights), seed=0)
        record = {"data": name, "first": first, "second": second, "scores": scores, "distance": found.distance}
        keep(out, "gap", {**record, "images": list(found.images), "same": found.same})
        print(f"{name} {first} {second}: distance {found.distance:.3f}, mIoU {scores}", flush=True)


def miou_of(model: Path, folder: Path) -> float:
    """On the test images."""
    known = folder / f"score-{model.parent.parent.parent.name}.txt"
    if not known.is_file():
        miou = evaluate_model(model, data=folder, split="test", device="cpu").scores.miou
        known.write_text(f"{0.0 if miou is None else miou}", encoding="utf-8")
    return float(known.read_text(encoding="utf-8"))


def measure_trust(data: Path, weights: Path, out: Path) -> None:
    """Error rate per decile of the applicability layer, on images of another domain, and of both domains; and per
    decile of the confidence on the former."""
    folders = domains(data, out / "domains")
    done = {(r["data"], r["source"], r["target"]) for r in read(out, "trust")}
    for name, source, target in TRUSTED:
        if (name, source) not in folders or (name, source, target) in done:
            continue
        model = model_of(folders[name, source], weights)
        own, other = (layers_of(model, folders[name, domain], domain == source) for domain in (source, target))
        deciles = {
            "target": error_deciles(other.applicability, other.wrong),
            "both": error_deciles(
                np.concatenate([own.applicability, other.applicability]), np.concatenate([own.wrong, other.wrong])
            ),
            "confidence": error_deciles(other.confidence, other.wrong),
        }
        keep(out, "trust", {"data": name, "source": source, "target": target, "deciles": deciles})
        print(f"{name} {source} -> {target}: {deciles}", flush=True)


class Layers(NamedTuple):
    """Values of two layers, and whether the class is wrong, per labeled pixel."""

    applicability: NDArray[np.uint8]
    confidence: NDArray[np.uint8]
    wrong: NDArray[np.bool_]


def layers_of(model: Path, folder: Path, only_test: bool) -> Layers:
    """The layers of all labeled pixels of a domain's images."""
    options = SceneOptions(applicability=True, confidence=True, device="cpu", overwrite=True, format="gtiff")
    prepared = prepare_for([model], options)
    task, index = prepared.network.task, SegmentationIndex.load(folder)
    reader = SampleReader(index, task.bands, cache=False)
    found = []
    with tempfile.TemporaryDirectory() as place:
        output = Path(place, "out.tif")
        for item in index.items:
            if only_test and item.split != "test":
                continue
            scene = prepare_scene(prepared, index.root / item.image, output, options)
            predict_prepared(scene)
            _, valid, mask = reader.sample(item)
            with ExitStack() as stack:
                files = [stack.enter_context(rasterio.open(path)) for path, _ in scene.products]
                layers = {file.descriptions[0]: file.read(1) for file in files[1:]}
                classes = files[0].read(1)
            truth = np.array([c.value for c in task.classes] + [255] * (256 - task.num_classes))[mask]
            known = valid & (mask != 255)
            found.append((layers["applicability"][known], layers["confidence"][known], (classes != truth)[known]))
    return Layers(*(np.concatenate(part) for part in zip(*found, strict=True)))


def error_deciles(values: NDArray[np.uint8], wrong: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Mean of the layer and error rate per tenth of the pixels, from its highest values to the lowest.

    Ties are broken at random, so that the order of the images has no effect.
    """
    order = np.lexsort((np.random.default_rng(0).random(len(values)), -values.astype(np.int64)))
    return [(float(values[part].mean() / 254), float(wrong[part].mean())) for part in np.array_split(order, 10)]


def measure_calibration(models: Path, out: Path) -> None:
    """Calibration error on the test images, as trained and with the temperature fitted on the validation images.

    Args:
        models: folder of cells of the accuracy table, SETTING/ARM/CELL; those that kept their model are measured.
        out: of the results.
    """
    done = {(r["setting"], r["arm"], r["seed"]) for r in read(out, "calibration")}
    for model in sorted(models.glob("*/*/seed*/model.safetensors")):
        job = json.loads((model.parent / "job.json").read_text(encoding="utf-8"))
        key = {name: job[name] for name in ("setting", "arm", "title", "seed")}
        if (key["setting"], key["arm"], key["seed"]) in done:
            continue
        details = evaluate_model(model, split="test", device="cpu", details=DetailOptions(boundary_width=0)).details
        found = details and details.calibration
        if not found or found.after is None or found.temperatures is None:
            print(f"{model}: not calibrated", flush=True)
            continue
        errors = {"before": found.before.ece, "after": found.after.ece, "temperature": found.temperatures[0]}
        keep(out, "calibration", key | errors)
        print(f"{model.parent}: {errors}", flush=True)


def measure_long(data: Path, weights: Path, out: Path, only: Sequence[str]) -> None:
    """Calibration of a packaged recipe at its own length; its models are kept like cells of the accuracy table.

    Args:
        data: prepared datasets of the accuracy table.
        weights: of the recipe's backbone.
        out: of models and results.
        only: settings of the accuracy table.
    """
    for name, seed in product(only, range(3)):
        setting, folder = SETTINGS[name], out / "cells" / name / LONG_RECIPE / f"seed{seed}"
        if (folder / "model.safetensors").is_file():
            continue
        dataset = data / ("dubai-half" if setting.dataset == "dubai" else setting.dataset)
        selected = setting.streams["labeled"]
        labeled = {key: str(dataset / value) if key == "items" else value for key, value in selected.items()}
        changes = {
            "seed": seed,
            "data.path": str(dataset),
            "data.streams.labeled": labeled,
            "data.bands": setting.bands,
            "data.augment.crop_size": PROFILES["cpu"].crop,
            "backbone.weights": str(weights),
            "trainer.device": "cpu",
            "trainer.workers": 0,
        }
        recipe = load_recipe(LONG_RECIPE, list(changes.items()))
        model = train(recipe, output=folder / "runs", progress=Progress()).model
        title = f"{LONG_RECIPE}, {recipe.trainer.steps} steps"
        write_json(folder / "job.json", {"setting": name, "arm": LONG_RECIPE, "title": title, "seed": seed})
        shutil.copyfile(model, folder / "model.safetensors")
        shutil.rmtree(folder / "runs")
    measure_calibration(out / "cells", out)


def measure_speed(side: int, rounds: int, data: Path, weights: Path, out: Path) -> None:
    """Suggest and applicability against plain prediction of one scene, alternately, and the time of an assessment."""
    folder = domains(data, out / "domains")["demo", "north"]
    model = model_of(folder, weights)
    with tempfile.TemporaryDirectory() as place:
        scene, result = Path(place, "scene.tif"), Path(place, "out.tif")
        write_scene(scene, data / "demo" / "scene" / "scene.tif", side)
        plain = SceneOptions(device="cpu", overwrite=True)
        layer = plain.model_copy(update={"applicability": True})
        networks = prepare_for([model], plain), prepare_for([model], layer)
        calls: dict[str, Callable[[], object]] = {
            "predict": lambda: predict_prepared(prepare_scene(networks[0], scene, result, plain)),
            "applicability": lambda: predict_prepared(prepare_scene(networks[1], scene, result, layer)),
            "suggest": lambda: suggest(
                model, networks[0], [str(scene)], Path(place, "next.gpkg"), plain, overwrite=True
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                begin = time.process_time()
                call()
                seconds[name].append(time.process_time() - begin)
        for name in ("applicability", "suggest"):
            ratios = [a / b for a, b in zip(seconds[name], seconds["predict"], strict=True)]
            record = {"name": name, "side": side, "ratios": ratios, "seconds": statistics.median(seconds["predict"])}
            keep(out, "speed", record)
            print(
                f"{name}: {statistics.median(ratios):.2f}x the processor time of predicting {side} x {side}, {ratios}"
            )
        points = Path(place, "points.gpkg")
        write_points(result, points, 10_000)
        begin = time.process_time()
        assess_points(result, points)
        spent = time.process_time() - begin
    keep(out, "speed", {"name": "assess", "side": side, "points": 10_000, "seconds": spent})
    print(f"assess: {spent:.2f} s of processor time for 10000 points on {side} x {side}")


def write_scene(path: Path, source: Path, side: int) -> None:
    """The scene of the demo, repeated to this size."""
    with rasterio.open(source) as file:
        pixels = file.read()
    rows, cols = (np.arange(side) % length for length in pixels.shape[1:])
    grid = {"crs": "EPSG:32631", "transform": Affine(2, 0, 5e5, 0, -2, 5e6), "tiled": True}
    kind = {"height": side, "width": side, "count": len(pixels), "dtype": pixels.dtype, "photometric": "RGB"}
    with rasterio.open(path, "w", driver="GTiff", **kind, **grid) as file:
        for top in range(0, side, 512):
            part = rows[top : top + 512]
            file.write(pixels[:, part][:, :, cols], window=((top, top + len(part)), (0, side)))


def write_points(classes: Path, points: Path, count: int) -> None:
    """Random points with the class of the map, a tenth of them with another one."""
    rng = np.random.default_rng(0)
    with rasterio.open(classes) as file:
        values, transform, crs = file.read(1), file.transform, file.crs
    found, number = np.unique(values[values != 255], return_counts=True)
    places = [
        np.argwhere(values == value)[rng.integers(0, total, max(count * total // number.sum(), 50))]
        for value, total in zip(found, number, strict=True)
    ]
    joined = np.concatenate(places)
    truth = values[joined[:, 0], joined[:, 1]]
    truth = np.where(rng.random(len(truth)) < 0.1, rng.choice(found, len(truth)), truth)
    x, y = transform * (joined[:, 1] + 0.5, joined[:, 0] + 0.5)
    geometry = shapely.to_wkb(shapely.points(x, y))
    pyogrio.raw.write(points, geometry, [truth.astype(np.int64)], ["truth"], geometry_type="Point", crs=str(crs))


def read(out: Path, kind: str) -> Iterator[Record]:
    """Kept results; of two with the same key the last counts."""
    file = out / f"{kind}.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        yield json.loads(line)


def keep(out: Path, kind: str, record: Mapping[str, Any]) -> None:
    """Append a result."""
    out.mkdir(parents=True, exist_ok=True)
    append_line(out / f"{kind}.jsonl", json.dumps(record))


def main(arguments: Sequence[str] | None = None) -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gap", "trust", "calibration", "long", "speed", "page"))
    parser.add_argument("file", type=Path, nargs="?", default=Path("docs/results-trust.md"), help="of the page")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of prepared datasets")
    parser.add_argument("--weights", type=Path, help=f"of {BACKBONE}")
    parser.add_argument("--models", type=Path, default=Path("runs/accuracy/cells"), help="cells of benchmarks.accuracy")
    parser.add_argument("--settings", nargs="+", default=LONG_SETTINGS, help="of `long`")
    parser.add_argument("--side", type=int, default=4000, help="of the scene in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/economy"))
    options = parser.parse_args(arguments)
    if options.what == "page":
        kept = {kind: list(read(options.out, kind)) for kind in ("gap", "trust", "calibration", "speed")}
        written = page(kept, options.file, network=BACKBONE, steps=STEPS)
        options.file.write_text(written, encoding="utf-8")
    elif options.what == "gap":
        measure_gaps(options.data, options.weights, options.out)
    elif options.what == "trust":
        measure_trust(options.data, options.weights, options.out)
    elif options.what == "calibration":
        measure_calibration(options.models, options.out)
    elif options.what == "long":
        measure_long(options.data, options.weights, options.out, options.settings)
    else:
        measure_speed(options.side, options.rounds, options.data, options.weights, options.out)


if __name__ == "__main__":
    main()
