"""What a prediction can give beside classes, and how it is told to work."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
import torch
from numpy.testing import assert_array_equal
from rasterio._env import get_gdal_config  # has no public name
from rasterio.features import rasterize
from rasterio.transform import Affine
from rasterio.warp import transform_geom

from rsseg.errors import DataError, MachineError
from rsseg.inference.predict import poses_of
from rsseg.raster import Raster, Window
from rsseg.scene.memory import prepare_network
from rsseg.scene.options import SceneOptions
from rsseg.scene.plan import prepare_scene
from rsseg.scene.predict import predict_scene
from rsseg.scene.writer import SceneWriter, draw_preview
from rsseg.vector.write import write_polygons
from tests.conftest import write_png, write_tif
from tests.scene.helpers import (
    expected_values,
    files_in,
    options,
    plan_scene,
    random_pixels,
    read_classes,
)
from tests.toys import ConvSegmenter, make_task


def shares_of(segmenter: ConvSegmenter, pixels: np.ndarray) -> np.ndarray:
    image = torch.from_numpy(pixels.astype(np.float32) / 255)[None]
    with torch.inference_mode():
        return segmenter.predict_logits(image)[0].softmax(0).numpy()


@pytest.mark.parametrize("kind", ["uint8", "float16"])
@pytest.mark.parametrize("file_format", ["cog", "gtiff"])
def test_probabilities_and_confidence_are_those_of_the_network(tmp_path: Path, kind: str, file_format: str) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(90, 130)
    pixels[:, :10] = 0
    scene = write_tif(tmp_path / "scene.tif", pixels, nodata=0)
    wanted = options(confidence=True, probabilities=kind, format=file_format)
    result = predict_scene(segmenter, scene, tmp_path / "out.tif", wanted)
    assert [p.name for p in result.extra_outputs] == ["out_confidence.tif", "out_probabilities.tif"]
    expected = shares_of(segmenter, np.where(pixels.any(0), pixels, 127.5))
    with rasterio.open(tmp_path / "out_probabilities.tif") as dataset:
        assert dataset.descriptions == segmenter.task.class_names
        assert (dataset.dataset_mask()[:10] == 0).all()
        shares = dataset.read() * dataset.scales[0]
    # Rows beside the filled border see another fill than the reference.
    assert np.abs(shares - expected)[:, 12:].max() < (0.0021 if kind == "uint8" else 0.0006)
    with rasterio.open(tmp_path / "out_confidence.tif") as dataset:
        assert dataset.nodata == 255
        confidence = dataset.read(1) * dataset.scales[0]
    assert np.abs(confidence - expected.max(0))[12:].max() < 0.0021
    classes = read_classes(tmp_path / "out.tif")[12:]
    assert_array_equal((classes - 1) // 10, expected.argmax(0)[12:])


@pytest.mark.parametrize("views", ["flip", "d4"])
def test_test_time_views_average_the_poses_of_each_tile(tmp_path: Path, views: str) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(50, 64)
    scene = write_tif(tmp_path / "scene.tif", pixels)
    predict_scene(segmenter, scene, tmp_path / "out.tif", options(tta=views))
    image = torch.from_numpy(pixels.astype(np.float32) / 255)
    with torch.inference_mode():
        poses = [(pose, segmenter.predict_logits(pose.apply(image, torch)[None])[0]) for pose in poses_of(views)]
        shares = sum(pose.undo(logits.softmax(0), torch) for pose, logits in poses)
    assert_array_equal(read_classes(tmp_path / "out.tif"), 10 * shares.argmax(0).numpy() + 1)


def test_eight_poses_are_different_and_can_be_undone() -> None:
    tile = torch.arange(12.0).reshape(1, 3, 4)
    seen = [pose.apply(tile, torch) for pose in poses_of("d4")]
    assert len({tuple(map(tuple, s[0].tolist())) for s in seen}) == 8
    for pose, view in zip(poses_of("d4"), seen, strict=True):
        assert torch.equal(pose.undo(view, torch), tile)


TURNED = Affine.translation(4e5, 5e6) @ Affine.rotation(30) @ Affine.scale(2, -3)
AREA = [[(20, 10), (110, 25), (90, 70), (35, 60), (20, 10)], [(50, 30), (60, 30), (60, 40), (50, 40), (50, 30)]]
"""Rings in columns and rows; a polygon with a hole."""


@pytest.mark.parametrize("system", ["EPSG:32631", "OGC:CRS84", "EPSG:3857"])
def test_only_the_area_of_interest_is_predicted_whatever_its_coordinates(tmp_path: Path, system: str) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(90, 130)
    scene = write_tif(tmp_path / "scene.tif", pixels, crs="EPSG:32631", transform=TURNED)
    rings = [[TURNED @ point for point in ring] for ring in AREA]
    shape = transform_geom("EPSG:32631", system, {"type": "Polygon", "coordinates": rings})
    content = {"type": "FeatureCollection", "features": [{"type": "Feature", "properties": {}, "geometry": shape}]}
    if system != "OGC:CRS84":
        content["crs"] = {"type": "name", "properties": {"name": system}}
    (tmp_path / "aoi.geojson").write_text(json.dumps(content))
    predict_scene(segmenter, scene, tmp_path / "out.tif", options(aoi=tmp_path / "aoi.geojson"))
    inside = rasterize([{"type": "Polygon", "coordinates": AREA}], (90, 130)) > 0
    # The network sees the surroundings of the area.
    whole = expected_values(segmenter, pixels)
    assert_array_equal(read_classes(tmp_path / "out.tif"), np.where(inside, whole, 255))


def test_only_tiles_with_a_pixel_of_the_area_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(700, 900)
    place = Affine(1e-3, 0, 10, 0, -1e-3, 50)
    scene = write_tif(tmp_path / "scene.tif", pixels, transform=place, crs="EPSG:4326")
    boxes = [(70, 40, 90, 60), (600, 30, 640, 50), (200, 400, 210, 690), (880, 660, 899, 700)]
    shapes = [shapely.box(*box) for box in boxes]
    placed = [shapely.box(*(place * box[:2]), *(place * box[2:])) for box in boxes]
    (tmp_path / "aoi.geojson").write_text(shapely.to_geojson(shapely.MultiPolygon(placed)))
    read: list[Window] = []
    original = Raster.read
    monkeypatch.setattr(Raster, "read", lambda raster, window: read.append(window) or original(raster, window))
    for blend in ("crop", "hann"):
        wanted = options(blend=blend, aoi=tmp_path / "aoi.geojson", batch_size=1)
        predict_scene(segmenter, scene, tmp_path / f"{blend}.tif", wanted)
        assert sum(window.height * window.width for window in read) < 0.6 * 700 * 900
        predict_scene(segmenter, scene, tmp_path / f"{blend}_whole.tif", options(blend=blend, batch_size=1))
        inside = rasterize(shapes, (700, 900)) > 0
        expected = np.where(inside, read_classes(tmp_path / f"{blend}_whole.tif"), 255)
        assert_array_equal(read_classes(tmp_path / f"{blend}.tif"), expected)
        read.clear()


def test_area_of_interest_may_be_a_geopackage_but_not_lie_outside(tmp_path: Path) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(40, 50)
    scene = write_tif(tmp_path / "scene.tif", pixels)
    classes = write_tif(
        tmp_path / "classes.tif", np.pad(np.ones((1, 20, 50), np.uint8), ((0, 0), (0, 20), (0, 0))), nodata=0
    )
    write_polygons(classes, segmenter.task, tmp_path / "aoi.gpkg")
    predict_scene(segmenter, scene, tmp_path / "out.tif", options(aoi=tmp_path / "aoi.gpkg"))
    valid = read_classes(tmp_path / "out.tif") != 255
    assert valid[:20].all()
    assert not valid[20:].any()
    far = write_tif(tmp_path / "far.tif", pixels, transform=Affine(10, 0, 9e5, 0, -10, 1e6))
    with pytest.raises(DataError, match="no pixel of the scene"):
        predict_scene(segmenter, far, tmp_path / "far_out.tif", options(aoi=tmp_path / "aoi.gpkg"))
    assert "far_out.tif" not in files_in(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.geojson", "{", "not a readable vector file"),
        ("a.geojson", '{"type": "FeatureCollection", "features": []}', "no polygon"),
        ("a.geojson", '{"type": "Point", "coordinates": [3, 36]}', "no polygon"),
        ("a.gpkg", "nonsense", "not a readable vector file"),
        ("a.shp", "", "not a readable vector file"),
        ("a.docx", "", "not a readable vector file"),
    ],
)
def test_area_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str, content: str, message: str) -> None:
    scene = write_tif(tmp_path / "scene.tif", random_pixels(20, 20))
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options(aoi=tmp_path / name))
    assert "out.tif" not in files_in(tmp_path)


@pytest.mark.parametrize("blend", ["crop", "hann"])
@pytest.mark.parametrize("size", [(150, 700), (64, 500), (30, 300)])
def test_wide_scene_in_panels_equals_the_scene_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blend: str, size: tuple[int, int]
) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(*size)
    pixels[:, :20, 100:400] = 0
    scene = write_tif(tmp_path / "scene.tif", pixels, nodata=0)
    predict_scene(segmenter, scene, tmp_path / "one.tif", options(blend=blend))
    monkeypatch.setattr("rsseg.scene.memory._BUFFER_BYTES", 1 << 18)
    assert plan_scene(segmenter, scene, tmp_path / "many.tif", options(blend=blend)).panels > 1
    predict_scene(segmenter, scene, tmp_path / "many.tif", options(blend=blend, confidence=True))
    assert_array_equal(read_classes(tmp_path / "many.tif"), read_classes(tmp_path / "one.tif"))


def test_less_memory_takes_smaller_batches_and_tiles_and_at_last_is_refused(tmp_path: Path) -> None:
    segmenter = ConvSegmenter(make_task(), kernel=5)
    scene = write_tif(tmp_path / "scene.tif", random_pixels(600, 900))
    usual = plan_scene(segmenter, scene, tmp_path / "out.tif", SceneOptions(device="cpu", tile=None))
    tight = SceneOptions(device="cpu", max_memory=usual.memory_bytes - 1)
    assert plan_scene(segmenter, scene, tmp_path / "out.tif", tight).memory_bytes < usual.memory_bytes
    with pytest.raises(MachineError, match="--max-memory"):
        plan_scene(segmenter, scene, tmp_path / "out.tif", SceneOptions(device="cpu", max_memory=1000))


def test_heap_is_trimmed_before_one_more_batch_could_exceed_the_allowed_memory(tmp_path: Path) -> None:
    scene, most = write_tif(tmp_path / "scene.tif", random_pixels(600, 900)), 300 << 20
    chosen = SceneOptions(device="cpu", max_memory=most)
    network = prepare_network(ConvSegmenter(make_task()), chosen)
    planned = prepare_scene(network, scene, tmp_path / "out.tif", chosen)
    batch = planned.compute.batch_size * network.cost(planned.plan.rows.tile, planned.plan.cols.tile).peak_bytes
    assert batch > 0
    assert planned.memory_bytes <= most
    assert network.held_before < planned.trim_above <= network.held_before + most - batch


def test_gdals_cache_is_bounded_while_outputs_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene, bounds, write = write_tif(tmp_path / "scene.tif", random_pixels(300, 200)), [], SceneWriter.write

    def written(self: SceneWriter, *arguments: Any) -> None:
        bounds.append(get_gdal_config("GDAL_CACHEMAX"))
        write(self, *arguments)

    monkeypatch.setattr(SceneWriter, "write", written)
    predict_scene(ConvSegmenter(make_task()), scene, tmp_path / "out.tif", options())
    assert bounds
    assert set(bounds) == {16 << 20}


def test_plan_of_a_scene_does_not_depend_on_its_size(tmp_path: Path) -> None:
    segmenter = ConvSegmenter(make_task())
    sizes = [(2000, 40000), (9000, 90000)]
    scenes = [tmp_path / f"{i}.vrt" for i in range(2)]
    source = write_tif(tmp_path / "scene.tif", random_pixels(10, 10))
    for scene, (height, width) in zip(scenes, sizes, strict=True):
        bands = "".join(
            f'<VRTRasterBand dataType="Byte" band="{b}"><SimpleSource><SourceFilename>{source}</SourceFilename>'
            f"<SourceBand>{b}</SourceBand></SimpleSource></VRTRasterBand>"
            for b in (1, 2, 3)
        )
        scene.write_text(f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">{bands}</VRTDataset>')
    usual = SceneOptions(device="cpu", tile=1024, overlap=128)
    first, second = (
        prepare_scene(prepare_network(segmenter, usual), scene, tmp_path / "out.tif", usual) for scene in scenes
    )
    assert second.memory_bytes < 1.2 * first.memory_bytes
    assert len(second.panels) > len(first.panels) > 1


def test_picture_shows_scene_classes_and_legend_and_is_transparent_without_data(tmp_path: Path) -> None:
    segmenter, pixels = ConvSegmenter(make_task()), random_pixels(100, 120)
    pixels[:, :, :60] = 0
    scene = write_tif(tmp_path / "scene.tif", pixels, nodata=0)
    predict_scene(segmenter, scene, tmp_path / "out.tif", options())
    draw_preview(scene, tmp_path / "out.tif", segmenter.task, tmp_path / "picture.png")
    with rasterio.open(tmp_path / "picture.png") as dataset:
        picture = dataset.read()
    assert len(picture) == 4
    alpha, colors = picture[3], picture[:3]
    assert (alpha[20:100, 20:70] == 0).all()
    assert (alpha[20:100, 75:130] == 255).all()
    shown = {tuple(c) for c in colors[:, 20:100, 210:260].reshape(3, -1).T.tolist()}
    assert shown == {c.color for c in segmenter.task.classes}


def test_pictures_without_coordinates_have_polygons_in_columns_and_rows(tmp_path: Path) -> None:
    segmenter = ConvSegmenter(make_task())
    scene = write_png(tmp_path / "scene.png", random_pixels(30, 40).transpose(1, 2, 0))
    predict_scene(segmenter, scene, tmp_path / "out.tif", options())
    write_polygons(tmp_path / "out.tif", segmenter.task, tmp_path / "out.geojson")
    shapes = json.loads((tmp_path / "out.geojson").read_text())["features"]
    burnt = rasterize([(s["geometry"], s["properties"]["value"]) for s in shapes], (30, 40), fill=255)
    assert_array_equal(burnt, read_classes(tmp_path / "out.tif"))
