"""Each dataset as its publisher lays it out, a few small images of it, in every layout that is accepted."""

import tarfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rsseg.datasets.cards import CARDS
from rsseg.datasets.known.aerial import POTSDAM_TEST, POTSDAM_TRAIN, VAIHINGEN_TEST, VAIHINGEN_TRAIN
from rsseg.task import Color
from tests.conftest import write_png, write_tif

SIZE = (40, 48)
"""Rows and columns of most images."""


@dataclass(frozen=True)
class Miniature:
    """A source folder or archive, and the options that go with it."""

    card: str
    variant: str
    make: Callable[[Path], Path]
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.card}-{self.variant}"


def colors_of(card: str) -> list[Color]:
    """What the masks of a card store, in class order."""
    labels = CARDS[card].labels[-1]
    by_class = {index: color for color, index in labels.label_map.colors if index < len(labels.classes)}
    return [by_class[index] for index in sorted(by_class)]


def values_of(card: str) -> list[int]:
    return list(CARDS[card].labels[0].label_map.values)


def scene(seed: str, choices: int, size: tuple[int, int] = SIZE) -> NDArray[np.int64]:
    """Blocks of class numbers; the same for the same name."""
    rng = np.random.default_rng([ord(letter) for letter in seed])
    blocks = rng.integers(0, choices, (size[0] // 8 + 1, size[1] // 8 + 1))
    return blocks.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]]


def pixels(classes: NDArray[np.int64], bands: int = 3, dtype: str = "uint8") -> NDArray[Any]:
    """`(h, w, bands)` that tell the class, none of them 0."""
    step = {"uint8": 20, "uint16": 1500}[dtype]
    noise = np.random.default_rng(int(classes.sum())).integers(0, step, (*classes.shape, bands))
    return (1 + classes[..., None] * step + noise + np.arange(bands)).astype(dtype)


def mask_of(card: str, classes: NDArray[np.int64]) -> NDArray[np.uint8]:
    """What a mask file of a card holds for class numbers."""
    if CARDS[card].labels[0].label_map.colors:
        return np.array(colors_of(card), np.uint8)[classes % len(colors_of(card))]
    return np.array(values_of(card), np.uint8)[classes % len(values_of(card))]


def write_jpg(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, quality=90)


def zipped(folder: Path, archive: Path, within: str = "") -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, Path(within) / path.relative_to(folder))
    return archive


def tarred(folder: Path, archive: Path, within: str, mode: str = "w:gz") -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, mode) as file:
        file.add(folder, within)
    return archive


def own_folder(root: Path) -> Path:
    """A user's folder: ten images, masks for six of them, and the class file."""
    for number in range(10):
        classes = scene(f"own{number}", 3)
        write_tif(root / "images" / f"{number}.tif", pixels(classes).transpose(2, 0, 1), photometric="RGB")
        if number < 6:
            write_png(root / "masks" / f"{number}.png", classes.astype(np.uint8))
    rows = "\n".join(f"  - {{name: class{value}, value: {value}, color: '#0000{value}0'}}" for value in range(3))
    (root / "classes.yaml").write_text(f"name: own\nbands: [red, green, blue]\nclasses:\n{rows}\n")
    return root


def shipped(card: str, root: Path) -> Path:
    """`img_dir` and `ann_dir` of KTDA's authors."""
    for split in CARDS[card].splits:
        for name in ("a_1", "b_2"):
            classes = scene(f"{split}{name}", len(CARDS[card].classes))
            if card == "grass":
                tif = pixels(classes).transpose(2, 0, 1)
                write_tif(root / "img_dir" / split / f"{name}.tif", tif, photometric="RGB")
            else:
                write_png(root / "img_dir" / split / f"{name}.png", pixels(classes))
            mask = Image.fromarray(classes.astype(np.uint8))
            mask.putpalette(bytes(range(256)) * 3)
            (root / "ann_dir" / split).mkdir(parents=True, exist_ok=True)
            mask.save(root / "ann_dir" / split / f"{name}.png")
    return root


def grass_zip(root: Path) -> Path:
    return zipped(shipped("grass", root / "files"), root / "grass.zip", "grass")


def cloud_zip(root: Path) -> Path:
    return zipped(shipped("cloud", root / "files"), root / "cloud.zip", "l8_biome")


def l8biome(root: Path, *, stacked: bool = True, mask: str = "TIF") -> Path:
    for biome in ("barren", "water"):
        for number in range(5):
            name = f"LC8{number:03d}0822013220LGN00"
            folder, classes = root / biome / name, scene(biome + name, 5)
            image = pixels(classes, 11, "uint16").transpose(2, 0, 1)
            image[:, :4] = 0
            stored = mask_of("l8biome", classes)
            stored[:4] = 0
            if stacked:
                write_tif(folder / f"{name}.TIF", image)
            for band in range(0 if stacked else 11):
                pan = image[band : band + 1].repeat(2, 1).repeat(2, 2)
                write_tif(folder / f"{name}_B{band + 1}.TIF", pan if band == 7 else image[band : band + 1])
            if mask == "TIF":
                write_tif(folder / f"{name}_fixedmask.TIF", stored[None])
            else:
                write_envi(folder / f"{name}_fixedmask.img", stored)
            (folder / f"{name}_MTL.txt").write_text("GROUP = L1_METADATA_FILE\n", encoding="ascii")
    return root


def write_envi(path: Path, mask: NDArray[np.uint8]) -> None:
    path.write_bytes(mask.tobytes())
    lines = ["ENVI", f"samples = {mask.shape[1]}", f"lines = {mask.shape[0]}", "bands = 1", "data type = 1"]
    path.with_suffix(".hdr").write_text("\n".join([*lines, "interleave = bsq", "byte order = 0", ""]), encoding="ascii")


def l8biome_tars(root: Path) -> Path:
    files = l8biome(root / "files")
    for biome in ("barren", "water"):
        tarred(files / biome, root / "packed" / f"{biome}.tar.gz", biome)
    return root / "packed"


def loveda(root: Path, size: tuple[int, int] = SIZE) -> Path:
    number = 0
    for split in ("Train", "Val", "Test"):
        for domain in ("Rural", "Urban"):
            for _ in range(3):
                classes = scene(f"{split}{domain}{number}", 8, size)
                write_png(root / split / domain / "images_png" / f"{number}.png", pixels(classes))
                if split != "Test":
                    write_png(root / split / domain / "masks_png" / f"{number}.png", classes.astype(np.uint8))
                number += 1
    return root


def loveda_zips(root: Path) -> Path:
    files = loveda(root / "files")
    for split in ("Train", "Val", "Test"):
        zipped(files / split, root / "packed" / f"{split}.zip", split)
    return root / "packed"


def loveda_nested(root: Path) -> Path:
    return zipped(loveda_zips(root), root / "2021LoveDA.zip", "2021LoveDA")


def loveda_partly_unpacked(root: Path) -> Path:
    packed = loveda_zips(root)
    (packed / "Train.zip").unlink()
    (root / "files" / "Train").rename(packed / "Train")
    return packed


POTSDAM_FOLDERS = {"RGB": ("2_Ortho_RGB", 3), "IRRG": ("3_Ortho_IRRG", 3), "RGBIR": ("4_Ortho_RGBIR", 4)}
_PARTS = (*POTSDAM_TRAIN[:3], *POTSDAM_TRAIN[-5:], *POTSDAM_TEST[:2])
"""Enough for every split rule."""


def isprs_mask(classes: NDArray[np.int64], *, borders: bool) -> NDArray[np.uint8]:
    mask = mask_of("potsdam", classes)
    if borders:
        mask[7::8] = 0
    return mask.transpose(2, 0, 1)


def potsdam(
    root: Path, names: Iterable[str] = _PARTS, kinds: Sequence[str] = tuple(POTSDAM_FOLDERS), *, beside: bool = False,
    labels: Sequence[str] = ("5_Labels_all", "5_Labels_all_noBoundary"), size: tuple[int, int] = SIZE,
) -> Path:  # fmt: skip
    for name in names:
        classes = scene(name, 6, size)
        for kind in kinds:
            folder, bands = POTSDAM_FOLDERS[kind]
            image = pixels(classes, bands).transpose(2, 0, 1)
            file = write_tif(root / folder / f"top_potsdam_{name}_{kind}.tif", image)
            if kind == "IRRG":
                file.with_suffix(".tfw").write_text("0.05\n0\n0\n-0.05\n366976.5\n5807952.5\n", encoding="ascii")
        for folder in labels:
            suffix = "label_noBoundary" if folder.endswith("noBoundary") else "label"
            place = POTSDAM_FOLDERS[kinds[0]][0] if beside else folder
            mask = isprs_mask(classes, borders=suffix != "label")
            # the publisher's labels have no coordinates
            write_tif(root / place / f"top_potsdam_{name}_{suffix}.tif", mask, crs=None, transform=None)
    return root


def potsdam_zips(root: Path, **options: Any) -> Path:
    files = potsdam(root / "files", **options)
    for folder in sorted(files.iterdir()):
        zipped(folder, root / "packed" / f"{folder.name}.zip", "" if folder.name.startswith("5") else folder.name)
    write_tif(root / "dsm" / "dsm_potsdam_02_10.tif", np.ones((1, 8, 8), np.float32))
    zipped(root / "dsm", root / "packed" / "1_DSM.zip", "1_DSM")
    return root / "packed"


_AREAS = (*VAIHINGEN_TRAIN[:4], 11, 13, *VAIHINGEN_TEST[:3])


def vaihingen(root: Path, areas: Iterable[int] = _AREAS, size: tuple[int, int] = SIZE) -> Path:
    main = root / "ISPRS_semantic_labeling_Vaihingen"
    for area in areas:
        name, classes = f"top_mosaic_09cm_area{area}", scene(f"area{area}", 6, size)
        write_tif(main / "top" / f"{name}.tif", pixels(classes).transpose(2, 0, 1))
        write_tif(main / "dsm" / f"dsm_09cm_matching_area{area}.tif", np.ones((1, 8, 8), np.float32))
        for folder, suffix in (("ground_truth_COMPLETE", ""), ("ground_truth_eroded_COMPLETE", "_noBoundary")):
            mask = isprs_mask(classes, borders=bool(suffix))
            labels = root / f"ISPRS_semantic_labeling_Vaihingen_{folder}"
            write_tif(labels / f"{name}{suffix}.tif", mask, crs=None, transform=None)
        if area in VAIHINGEN_TRAIN:
            write_tif(main / "gts_for_participants" / f"{name}.tif", isprs_mask(classes, borders=False))
    return root


def vaihingen_zips(root: Path) -> Path:
    for folder in sorted(vaihingen(root / "files").iterdir()):
        zipped(folder, root / "packed" / f"{folder.name}.zip")
    return root / "packed"


def deepglobe(
    root: Path, images: str = "train/{}_sat.jpg", masks: str = "train/{}_mask.png", others: Sequence[str] = (),
    size: tuple[int, int] = SIZE,
) -> Path:  # fmt: skip
    for number in range(6):
        name, classes = f"{100 + number}", scene(f"deepglobe{number}", 7, size)
        image, mask = pixels(classes), mask_of("deepglobe", classes)
        mask[0, 0] = np.where(mask[0, 0] > 0, 250, 3)
        path = root / images.format(name)
        (write_jpg if path.suffix == ".jpg" else write_png)(path, image)
        write_png(root / masks.format(name), mask)
    for folder in others:
        write_jpg(root / folder / "900_sat.jpg", pixels(scene(folder, 7, size)))
    return root


def deepglobe_kaggle(root: Path) -> Path:
    files = deepglobe(root / "files", others=("valid", "test"))
    (files / "class_dict.csv").write_text("name,r,g,b\n", encoding="ascii")
    (files / "metadata.csv").write_text("image_id,split\n", encoding="ascii")
    return zipped(files, root / "archive.zip")


def gid(root: Path, folder: str = "image_NirRGB", *, size: tuple[int, int] = SIZE) -> Path:
    base = root / "Large-scale Classification_5classes"
    for number in range(5):
        name, classes = f"GF2_PMS1__L1A000056453{number}-MSS1", scene(f"gid{number}", 5, size)
        bands = 4 if folder == "image_NirRGB" else 3
        write_tif(base / folder / f"{name}.tif", pixels(classes, bands).transpose(2, 0, 1), crs=None, transform=None)
        mask = mask_of("gid5", classes).transpose(2, 0, 1).copy()
        mask[:, :2] = 0
        write_tif(base / "label_5classes" / f"{name}_label.tif", mask, crs=None, transform=None)
    return root


def landcovernet(root: Path, *, tables: bool = True) -> Path:
    for tile in ("35JNN", "35JQG", "35KKP", "35LMC", "35MNT", "36KTB"):
        for chip in ("00", "01"):
            folder, classes = root / tile / chip / "S2", scene(tile + chip, 8)
            score = np.full_like(classes, 90)
            write_tif(folder / f"{tile}_{chip}_2018_LC_10m.tif", np.stack([classes, score]).astype(np.uint8))
            dates = ("20180101", "20180706", "20181121")
            for date in dates:
                name = f"{tile}_{chip}_{date}"
                image = pixels(classes, 4, "uint16").transpose(2, 0, 1)
                for band, number in zip(image, (4, 3, 2, 8), strict=True):
                    write_tif(folder / name / f"{name}_B{number:02d}_10m.tif", band[None])
                write_tif(folder / name / f"{name}_CLD_10m.tif", np.zeros((1, *SIZE), np.uint8))
            if tables:
                rows = [",date", *(f"{i},{date}" for i, date in enumerate(dates[:2]))]
                (folder / f"{tile}_{chip}.csv").write_text("\n".join(rows) + "\n", encoding="gbk")
    return root


def city_osm(root: Path, size: tuple[int, int] = SIZE) -> Path:
    for city in ("paris", "chicago"):
        for number in range(1, 6):
            classes = scene(f"{city}{number}", 3, size)
            write_png(root / city / f"{city}{number}_image.png", pixels(classes))
            write_png(root / city / f"{city}{number}_labels.png", mask_of("city-osm", classes))
    return root


def city_osm_zips(root: Path) -> Path:
    files = city_osm(root / "files")
    for city in ("paris", "chicago"):
        zipped(files / city, root / "packed" / f"{city}.zip")
    return root / "packed"


def _all() -> Iterable[Miniature]:
    def one(card: str, variant: str, make: Callable[[Path], Path], **options: Any) -> Miniature:
        return Miniature(card, variant, make, options)

    yield one("grass", "zip", grass_zip)
    yield one("grass", "folder", lambda root: shipped("grass", root / "data" / "grass"))
    yield one("cloud", "zip", cloud_zip)
    yield one("cloud", "tar.xz", lambda root: tarred(shipped("cloud", root / "f"), root / "cloud.tar.xz", "x", "w:xz"))
    yield one("l8biome", "tars", l8biome_tars, tile=16)
    yield one("l8biome", "stacked", l8biome)
    yield one("l8biome", "bands", lambda root: l8biome(root, stacked=False), bands=("red", "green", "blue"), tile=16)
    yield one("l8biome", "bands-envi", lambda root: l8biome(root, stacked=False, mask="img"))
    yield one("l8biome", "chosen-bands", l8biome, bands=("nir", "red"), tile=16)
    yield one("loveda", "zips", loveda_zips)
    yield one("loveda", "nested", loveda_nested)
    yield one("loveda", "folder", loveda)
    yield one("loveda", "partly-unpacked", loveda_partly_unpacked)
    yield one("loveda", "rs-dwl", loveda, split="rs-dwl", tile=24)
    yield one("potsdam", "zips", potsdam_zips, tile=16)
    yield one("potsdam", "nested", lambda root: zipped(potsdam_zips(root), root / "Potsdam.zip", "Potsdam"), tile=16)
    yield one("potsdam", "folders", potsdam, bands=("nir", "red", "green"), split="isprs-val")
    yield one("potsdam", "four-bands", potsdam, bands=("red", "green", "blue", "nir"))
    irrg = ("nir", "red", "green")
    yield one("potsdam", "from-four", lambda root: potsdam(root, kinds=("RGBIR",)), bands=irrg, tile=16)
    yield one("potsdam", "beside", lambda root: potsdam(root, kinds=("RGB",), beside=True))
    yield one("potsdam", "no-boundary", potsdam_zips, labels="no-boundary", tile=16, ignore_classes=("clutter",))
    yield one("potsdam", "rs-dwl", potsdam, split="rs-dwl", tile=16)
    yield one("potsdam", "st-dasegnet", potsdam, split="st-dasegnet", tile=16)
    yield one("vaihingen", "zips", vaihingen_zips, tile=16)
    yield one("vaihingen", "no-boundary", vaihingen_zips, labels="no-boundary", split="st-dasegnet", tile=16)
    yield one("vaihingen", "folders", vaihingen, split="isprs-val")
    yield one("deepglobe", "kaggle", deepglobe_kaggle)
    land = {"images": "land-train/{}_sat.jpg", "masks": "land-train/{}_mask.png"}
    yield one("deepglobe", "land-train", lambda root: deepglobe(root, **land), split="rs-dwl", tile=16)
    yield one("deepglobe", "flat", lambda root: deepglobe(root, "{}_sat.jpg", "{}_mask.png"), labels="with-unknown")
    data = "data/training_data/"
    yield one("deepglobe", "training-data", lambda root: deepglobe(root, data + "images/{}.jpg", data + "masks/{}.png"))
    named = (data + "images/{}_sat.jpg", data + "masks/{}_mask.png")
    yield one("deepglobe", "training-data-named", lambda root: deepglobe(root, *named))
    yield one("gid5", "folder", gid, tile=16)
    yield one("gid5", "zip", lambda root: zipped(gid(root / "f"), root / "gid.zip"), split="st-dasegnet", tile=16)
    yield one("gid5", "rgb", lambda root: gid(root, "image_RGB"))
    yield one("landcovernet-s2", "folders", landcovernet)
    yield one("landcovernet-s2", "stretched", landcovernet, bands=("red", "green", "blue"), stretch="minmax")
    yield one("landcovernet-s2", "no-tables", lambda root: landcovernet(root, tables=False), split="scene")
    yield one("city-osm", "folders", city_osm)
    yield one("city-osm", "zips", city_osm_zips, split="st-dasegnet", tile=16)


MINIATURES = tuple(_all())
