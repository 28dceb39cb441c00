"""The plan of a prediction, made before the first pixel is read: files, bands, tiles, panels, memory."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rsseg.checkpoint import Calibration
from rsseg.errors import DataError, UsageError
from rsseg.files import check_outputs
from rsseg.gdal import category_names
from rsseg.inference.blend import CLASSES_ONLY, PixelOutputs
from rsseg.inference.engines import Quantization
from rsseg.inference.machine import memory_errors, thread_count
from rsseg.inference.predict import Compute, Network, poses_of
from rsseg.inference.tiling import Panel, TilePlan
from rsseg.raster import Raster, RasterInfo, match_bands
from rsseg.scene.memory import OUT_OF_MEMORY, PreparedNetwork, fit_memory
from rsseg.scene.options import SceneOptions, ScenePlan
from rsseg.scene.source import identify_files, local_file, open_scene, source_files
from rsseg.scene.writer import Product, class_product, confidence_product, probability_product
from rsseg.task import IGNORE_INDEX, Task
from rsseg.vector.grid import Grid

if TYPE_CHECKING:
    from rsseg.vector.aoi import Region

_MOST_SIDE, _MOST_PIXELS = 10**8, 10**14
"""The land of the Earth has 1.5e14 m2."""
_MOST_DECODERS = 8
"""Threads that decode a scene for a GPU."""
_GSD_RATIO = 1.5
"""Pixels that are larger or smaller than those of the training by more than this factor are worth a warning."""


@dataclass(frozen=True)
class PreparedScene:
    """A planned prediction.

    files: everything that is read for the scene, the area of interest included
    region: the area of interest
    calibration: of the model's probabilities
    quantization: of a network in int8 arithmetic
    model: hash of the network's weights
    panels: of `plan`
    products: final name and content of each raster, the class raster first
    polygons, preview: final names, None if not asked for
    memory_bytes: estimate, libraries excluded
    trim_above: bytes of the process above which free memory is returned to the system
    seconds: estimate
    """

    scene: str
    options: SceneOptions
    files: tuple[str, ...]
    info: RasterInfo
    bands: tuple[int, ...]
    region: "Region | None"
    network: Network
    calibration: Calibration | None
    quantization: Quantization | None
    model: str
    compute: Compute
    plan: TilePlan
    panels: tuple[Panel, ...]
    products: tuple[tuple[Path, Product], ...]
    polygons: Path | None
    preview: Path | None
    memory_bytes: int
    trim_above: int
    seconds: float
    warnings: tuple[str, ...]

    @property
    def output(self) -> Path:
        """The class raster."""
        return self.products[0][0]

    @property
    def pixel_outputs(self) -> PixelOutputs:
        """Values to compute for each pixel."""
        options, calibration = self.options, self.calibration
        return PixelOutputs(
            options.confidence,
            options.probabilities,
            # Without probabilities the network's classes need no temperature, nor the slower path.
            None if calibration is None or not options.measures_probabilities else calibration.temperatures,
            options.min_confidence,
            find_unsure(self.network.task, options),
            options.applicability,
            options.disagreement,
        )

    @property
    def tiles(self) -> int:
        """Number of tiles; those of two panels count twice."""
        return sum(panel.plan.count for panel in self.panels)

    @property
    def decoders(self) -> int:
        """Threads that decode the scene; one where the network computes on the same cores."""
        return 1 if self.network.device == "cpu" else min(thread_count(), _MOST_DECODERS)

    def open(self) -> Raster:
        """Open the scene with the bands that are used."""
        return open_scene(self.scene, self.options, self.bands, max(p.plan.cols.length for p in self.panels))

    def identity(self) -> str:
        """Hash of everything that can change a pixel of the outputs: equal hashes, equal outputs.

        Tiles are included: they follow from the size of the scene, the network and the options. Batch size and free
        memory are left out: they change the last digits of logits at most.
        """
        names = {"blend", "nodata", "gsd", "zero_collar", "tta", "confidence", "probabilities", "format"}
        settings = self.options.model_dump(mode="json", include=names) | {
            "bands": self.bands,
            "tile": (self.plan.rows.tile, self.plan.cols.tile),
            "overlap": self.plan.overlap,
            "dtype": self.network.dtype,
            "device": self.network.device.partition(":")[0],
            "engine": self.network.engine,
        }
        if self.pixel_outputs != CLASSES_ONLY:
            settings |= asdict(self.pixel_outputs)
        parts = [identify_files(self.files), self.model, settings]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def describe(self) -> ScenePlan:
        """The plan for the user."""
        return ScenePlan(
            scene=self.scene,
            output=self.output,
            height=self.info.height,
            width=self.info.width,
            bands=tuple(zip(self.network.task.bands, self.info.band_names, strict=True)),
            tile=(self.plan.rows.tile, self.plan.cols.tile),
            overlap=self.plan.overlap,
            tiles=self.tiles,
            redundancy=self.plan.redundancy * self.tiles / self.plan.count,
            blend=self.options.blend,
            batch_size=self.compute.batch_size,
            parallel_batches=self.compute.parallel_batches,
            device=self.network.device,
            dtype=self.network.dtype,
            engine=self.network.engine,
            quantization=self.quantization,
            views=len(self.compute.poses),
            panels=len(self.panels),
            memory_bytes=self.memory_bytes,
            seconds=self.seconds,
            warnings=self.warnings,
        )


def prepare_scene(
    prepared: PreparedNetwork,
    scene: Path | str,
    output: Path | None,
    options: SceneOptions,
    inputs: Iterable[Path | str] = (),
) -> PreparedScene:
    """Open a scene, check the outputs, and choose the options that are None.

    Args:
        prepared: the network.
        scene: anything GDAL can open.
        output: the class raster; None: nothing will be written.
        options: see `SceneOptions`.
        inputs: further files that no output may replace, such as the model.

    Raises:
        UsageError: an output exists, would replace an input, or cannot be written; overlap and tile do not fit.
        DataError: the scene is missing, damaged, or lacks bands; the area of interest cannot be read or lies outside.
        MachineError: the prediction does not fit into the allowed memory.
    """
    network = prepared.network
    find_unsure(network.task, options)
    with open_scene(scene, options, None) as raster:
        if raster.info.colormap is not None and len(network.task.bands) > 1:
            raise DataError(
                f"{scene}: a palette image with one band; the model needs {len(network.task.bands)}. Convert it with "
                "gdal_translate -expand rgb."
            )
        try:
            bands = match_bands(raster.info, network.task.bands, options.bands)
        except DataError as error:
            message = str(error)
            raise DataError(message if message.startswith(str(scene)) else f"{scene}: {message}") from None
    with open_scene(scene, options, bands) as raster:
        info, files = raster.info, source_files(raster.files)
    if max(info.height, info.width) > _MOST_SIDE or info.height * info.width > _MOST_PIXELS:
        raise DataError(
            f"{scene}: {info.width} x {info.height} pixels are more than a prediction can finish. Predict a part of it "
            "(gdal_translate -of VRT -srcwin)."
        )
    region = None
    if options.aoi is not None:
        from rsseg.vector.aoi import read_region, region_files  # vector libraries only where they are needed

        region = read_region(options.aoi, info)
        files += tuple(str(file) for file in region_files(options.aoi))
    products: tuple[tuple[Path, Product], ...] = ()
    polygons: Path | None = None
    preview: Path | None = None
    if output is not None:
        products = _products(network.task, output, options)
        polygons, preview = (_named_after(output, name) for name in (options.polygons, options.preview))
        read = [*inputs, *{path for file in files if (path := local_file(file)) is not None}]
        _check_outputs(network.task, output, options, read)
    with memory_errors(OUT_OF_MEMORY):
        fit = fit_memory(prepared, info, [product for _, product in products], options)
    poses = poses_of(options.tta)
    return PreparedScene(
        scene=str(scene),
        options=options,
        files=files,
        info=info,
        bands=bands,
        region=region,
        network=network,
        calibration=prepared.calibration,
        quantization=prepared.quantization,
        model=prepared.model,
        compute=Compute(fit.batch_size, fit.tiling.least, poses, fit.parallel_batches),
        plan=fit.plan,
        panels=fit.panels,
        products=products,
        polygons=polygons,
        preview=preview,
        memory_bytes=fit.memory_bytes,
        trim_above=prepared.held_before + fit.trim_above,
        seconds=fit.cost.seconds * sum(p.plan.count for p in fit.panels) * len(poses),
        warnings=(*_band_warnings(info, network.task, options), *_gsd_warnings(info, network.task), *fit.warnings),
    )


def _check_outputs(task: Task, output: Path, options: SceneOptions, read: Sequence[Path | str]) -> None:
    check_outputs(list_outputs(task, output, options), read, overwrite=options.overwrite)
    # A side file of that name would become one of the output; it may be that of an earlier, deleted one.
    side = output.with_name(f"{output.name}.aux.xml")
    own = category_names(str(side)) == {c.value: c.name for c in task.classes}
    check_outputs([("--output", side)], read, overwrite=options.overwrite or output.exists() or own)


def find_unsure(task: Task, options: SceneOptions) -> int:
    """Index of the class for pixels below `min_confidence`; 255 for no data.

    Raises:
        UsageError: there is no such class, or it would never be used.
    """
    name = options.unsure_class
    if name is None:
        return IGNORE_INDEX
    if not options.min_confidence:
        raise UsageError(f"--unsure-class {name}: has no effect without --min-confidence. Give both, such as 0.6.")
    if name not in task.class_names:
        raise UsageError(
            f"--unsure-class {name}: the model has no such class. Choose one of {', '.join(task.class_names)}."
        )
    return task.class_names.index(name)


def list_outputs(task: Task, output: Path, options: SceneOptions) -> list[tuple[str, Path]]:
    """All files that a prediction writes, each with the option that asks for it.

    Raises:
        UsageError: the format of the polygons or of the preview is unknown.
    """
    outputs = [("--output", path) for path, _ in _products(task, output, options)]
    if (polygons := _named_after(output, options.polygons)) is not None:
        from rsseg.vector.write import polygon_files

        outputs += [("--polygons", file) for file in polygon_files(polygons)]
    if (preview := _named_after(output, options.preview)) is not None:
        if preview.suffix.lower() != ".png":
            raise UsageError(f"{preview}: --preview writes a PNG. Give a name that ends in .png.")
        outputs.append(("--preview", preview))
    return outputs


def _named_after(output: Path, name: Path | None) -> Path | None:
    """Expand an extension alone, such as `.gpkg`, to the name of the output with this extension."""
    return output.with_suffix(name.name) if name is not None and is_extension(name) else name


def is_extension(name: Path) -> bool:
    """Whether a name is an extension alone."""
    return name.parent == Path() and name.suffix == "" and name.name[:1] == "." and len(name.name) > 1


def _band_warnings(info: RasterInfo, task: Task, options: SceneOptions) -> list[str]:
    warnings = []
    if info.dtype != task.dtype:
        warnings.append(
            f"the pixels are {info.dtype}, the network was trained on {task.dtype}; they are scaled the same way"
        )
    named = [
        (wanted, name)
        for wanted, name, color, number in zip(task.bands, info.band_names, info.colors, info.numbers, strict=True)
        if name not in (color, f"band_{number}")
    ]
    if options.bands is None and (wrong := [pair for pair in named if pair[0].casefold() not in pair[1].casefold()]):
        wanted, name = wrong[0]
        warnings.append(
            f"the band {name!r} of the file is used as {wanted}; bands were not matched by name. "
            f"Give the order with --bands {','.join(f'NAME_OF_{band.upper()}' for band in task.bands)}"
        )
    return warnings


def _gsd_warnings(info: RasterInfo, task: Task) -> list[str]:
    sides = Grid(info).ground_sides()
    if task.gsd_m is None or sides is None:
        return []
    gsd = math.sqrt(sides[0] * sides[1])
    if 1 / _GSD_RATIO <= gsd / task.gsd_m <= _GSD_RATIO:
        return []
    return [
        f"the pixels are {gsd:.3g} m on the ground, the network was trained at {task.gsd_m:g} m. Resample with "
        f"--gsd {task.gsd_m:g}"
    ]


def _products(task: Task, output: Path, options: SceneOptions) -> tuple[tuple[Path, Product], ...]:
    products = [(output, class_product(task))]
    if options.confidence:
        products.append((output.with_name(f"{output.stem}_confidence.tif"), confidence_product()))
    for name in ("applicability", "disagreement"):
        if getattr(options, name):
            products.append((output.with_name(f"{output.stem}_{name}.tif"), confidence_product(name)))
    if options.probabilities != "none":
        path = output.with_name(f"{output.stem}_probabilities.tif")
        products.append((path, probability_product(task, options.probabilities)))
    return tuple(products)
