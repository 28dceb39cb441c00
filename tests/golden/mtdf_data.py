"""RS-MTDF's golden cases of data and scores: geometry and label conventions, CutMix boxes, published evaluation."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from rsseg.checkpoint import load_into
from rsseg.config import EvalConfig, StrongConfig
from rsseg.data.assembly import Crop, collate
from rsseg.data.augmentation import Cut, Geometry, box_size, pad_origin, transform_image, transform_mask
from rsseg.data.index import LabelMap
from rsseg.data.labels import LabelTable
from rsseg.data.streams import Samples, Scaling, to_samples
from rsseg.inference.image import predict_image, predict_probabilities
from rsseg.methods.base import Segmenter, TileHint
from rsseg.metrics import ConfusionMatrix, Scores, scores
from rsseg.raster import Window
from rsseg.task import IGNORE_INDEX
from tests.golden.builders import make_task
from tests.golden.case import Case
from tests.golden.harness import Drivers
from tests.golden.settings import Settings, plain

LABEL_MAPS = MappingProxyType(
    {
        "loveda": LabelMap(values={0: IGNORE_INDEX} | {value: value - 1 for value in range(1, 8)}),
        "deepglobe": LabelMap(values={value: value for value in range(7)}),
        "potsdam": LabelMap(values={value: value for value in range(6)}),
    }
)
COLUMNS = ["crop size", "area fraction", "aspect ratio h/w", "x", "y", "box width", "box height"]


def augment(case: Case) -> None:
    """Recorded draws applied: scaled, padded, cropped, mirrored, normalized; in `val` only normalized."""
    hyper = case.meta["hyper_parameters"]
    hyper.expect("mode", "train_l", "train_u", "val", "test")
    hyper.expect("resize_range", [0.5, 2.0])
    pixels = case.tensors["in.image_uint8_hwc"].numpy()
    size = pixels.shape[:2]
    assert size == (hyper["source_height"], hyper["source_width"])
    crop = hyper.get("crop_size", max(size))
    geometry = geometry_of(hyper, size, crop)
    image = transform_image(pixels, geometry)
    valid = transform_mask(np.ones(size, np.bool_), geometry)
    dataset = hyper["dataset"].lower()
    assert dataset in LABEL_MAPS, f"{case.name}: unknown dataset {dataset}"
    mask = transform_mask(class_indices(case, dataset), geometry) if "out.mask" in case.tensors else None
    samples = collated(Crop(image, valid, mask, origin=pad_origin(geometry, crop)), crop)
    images, ignored = samples.images[0], ~samples.valid[0]
    if "long_side" not in hyper:  # the whole image, which need not be square
        images, ignored = images[:, : size[0], : size[1]], ignored[: size[0], : size[1]]

    mean, std = (torch.tensor(plain(hyper[name]))[:, None, None] for name in ("mean", "std"))
    for key in ("out.image", "out.image_weak"):
        if case.has(key):
            case.check((images - mean) / std, key)
    if samples.masks is not None:
        masks = samples.masks[0][: ignored.shape[0], : ignored.shape[1]]
        case.close("out.mask", masks, case.tensors["out.mask"], rtol=0.0, atol=0.0)
    if case.has("out.ignore_mask"):
        padding = case.tensors["out.ignore_mask"] == IGNORE_INDEX
        case.close("out.ignore_mask", ignored, padding, rtol=0.0, atol=0.0)


def geometry_of(hyper: Settings, size: tuple[int, int], crop: int) -> Geometry:
    """From the recorded draws; without any the image stays as it is."""
    window = Window(0, 0, *size)
    if "long_side" not in hyper:
        return Geometry(window, size, hflip=hyper.get("hflip", False), vflip=False, turns=0)
    factor = hyper["long_side"] / max(size)
    scaled = int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)
    out = min(scaled[0], crop), min(scaled[1], crop)
    cut = Cut(scaled, (hyper["crop_y"], hyper["crop_x"]))
    return Geometry(window, out, hyper["hflip"], vflip=False, turns=0, cut=cut)


def class_indices(case: Case, dataset: str) -> np.ndarray:
    """Class indices of the stored mask, whose three channels, if it has them, are equal."""
    stored = case.tensors["in.mask_uint8"].numpy()
    if stored.ndim == 3:
        assert (stored == stored[..., :1]).all()
        stored = stored[..., 0]
    label_map = LABEL_MAPS[dataset]
    classes = max(index for index in label_map.values.values() if index != IGNORE_INDEX) + 1
    return LabelTable(label_map, classes).indices(stored[None], None, name=case.name)


def collated(crop: Crop, side: int) -> Samples:
    """A crop as it reaches the device, padded with black."""
    task = make_task(2).model_copy(update={"scale": (1 / 255,) * 3})
    return to_samples(collate([crop], side), Scaling.of(task, (0.0,) * 3, torch.device("cpu")))


def cutmix_box(case: Case) -> None:
    hyper, drawn = case.meta["hyper_parameters"], StrongConfig()
    hyper.expect("columns", COLUMNS)
    hyper.expect("size_range", list(drawn.cutmix_area))
    hyper.expect("ratio_range", list(drawn.cutmix_aspect))
    for crop, area, aspect, x, y, width, height in case.tensors["table"].tolist():
        sides = box_size(area, aspect, int(crop))
        case.close(f"box {area} {aspect}", torch.tensor(sides), torch.tensor((height, width)), rtol=0.0, atol=0.0)
        assert max(x + width, y + height) <= crop


class _Convolution(Segmenter):
    """The recorded network."""

    def __init__(self, classes: int, multiple: int, state: dict[str, Tensor]) -> None:
        task = make_task(classes)
        super().__init__(task, input_multiple=multiple, fill=(0.0,) * 3, tile=TileHint(multiple, 0, flexible=True))
        weight = state["conv.weight"]
        self.conv = nn.Conv2d(weight.shape[1], classes, weight.shape[-1], padding=weight.shape[-1] // 2)
        load_into(self, state, "golden")

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-2] % self.input_multiple == 0
        assert images.shape[-1] % self.input_multiple == 0
        return self.conv(images)  # type: ignore[no-any-return]


def evaluator(case: Case) -> None:
    """Predictions of whole images at a multiple of the patch, and the published scores of all of them."""
    hyper = case.meta["hyper_parameters"]
    hyper.expect("ignore_index", IGNORE_INDEX)
    hyper.expect("model", "one 3x3 convolution, padding 1")
    segmenter = _Convolution(hyper["nclass"], hyper["multiplier"], case.group("param")).eval()
    config = EvalConfig(resize_multiple=hyper["multiplier"])
    matrix = ConfusionMatrix(hyper["nclass"])
    for i, size in enumerate(plain(hyper["sizes"])):
        image = case.tensors[f"in.image{i}"][0]
        assert list(image.shape[1:]) == size
        predicted = torch.from_numpy(predict_image(segmenter, image, None, config, device="cpu"))
        wrong = int((predicted != case.tensors[f"out.pred{i}"][0]).sum())
        most = case.meta["tolerance"]["pred_mismatched_pixels_max"]
        case.close(f"wrong pixels of out.pred{i}", max(wrong - most, 0), 0, atol=0.0)
        if case.has(f"out.logits{i}"):
            probable = predict_probabilities(segmenter, image, None, config, device="cpu").permute(2, 0, 1)
            case.close(f"softmax of out.logits{i}", probable, case.tensors[f"out.logits{i}"][0].softmax(0))
        matrix.update(predicted, case.tensors[f"in.mask{i}"][0])
    check_scores(case, matrix, segmenter.task.class_names)


def check_scores(case: Case, matrix: ConfusionMatrix, names: tuple[str, ...]) -> None:
    expected, atol = case.meta["scalars"], case.meta["tolerance"]["metric_atol"]
    everything = scores(matrix.counts, names)
    for key, actual in {
        "training_eval_mIoU": everything.variants["miou_absent_zero"],
        "training_eval_IoU": [entry.iou or 0.0 for entry in everything.classes],
    }.items():
        if key in expected:
            case.close(key, 100 * torch.tensor(actual), expected[key], atol=atol)
    for key in (key for key in expected if key.startswith("test_script_")):
        wanted, ignored = expected[key], _ignored(key, names)
        found: Scores = scores(matrix.counts, names, ignore=ignored)
        compared: Mapping[str, tuple[float | None, float]] = {
            "mIoU": (found.variants["miou_absent_zero"], 100),
            "mF1": (found.variants["mf1_all_predictions"], 100),
            "kappa": (found.variants["kappa_all_predictions"], 1),
        }
        for name, (value, scale) in compared.items():
            assert value is not None
            case.close(f"{key} {name}", scale * value, wanted[name], atol=atol * scale / 100)
        kept = [iou for name, iou in zip(names, wanted["IoU"], strict=True) if name not in ignored]
        actual = [entry.iou or 0.0 for entry in found.classes]
        case.close(f"{key} IoU", 100 * torch.tensor(actual), kept, atol=atol)


def _ignored(key: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """`test_script_ignore_class6` -> the name of class 6."""
    if key == "test_script_all_classes":
        return ()
    before, separator, index = key.partition("ignore_class")
    assert separator, f"unknown score {key}"
    assert before == "test_script_", f"unknown score {key}"
    return (names[int(index)],)


DRIVERS: Drivers = {"augment": augment, "cutmix_box": cutmix_box, "evaluator": evaluator}
