"""Golden cases of data and scores: geometry and label conventions, CutMix boxes, the published evaluation."""

from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from rsseg.checkpoint import load_into
from rsseg.config import EvalConfig
from rsseg.data.assembly import Crop, collate
from rsseg.data.index import LabelMap
from rsseg.data.labels import LabelTable
from rsseg.data.photometric import box_size
from rsseg.data.streams import Scaling, to_samples
from rsseg.data.transforms import Cut, Geometry, pad_origin, transform_image, transform_mask
from rsseg.inference.image import predict_image
from rsseg.methods.base import Segmenter, TileHint
from rsseg.metrics import ConfusionMatrix, Scores, scores
from rsseg.raster import Window
from rsseg.task import IGNORE_INDEX
from tests.conftest import rgb_task
from tests.golden.harness import Case, Handler
from tests.golden.mtdf_parts import make_task

LABEL_MAPS = MappingProxyType(
    {
        "loveda": LabelMap(values={0: IGNORE_INDEX} | {value: value - 1 for value in range(1, 8)}),
        "deepglobe": LabelMap(values={value: value for value in range(7)}),
        "potsdam": LabelMap(values={value: value for value in range(6)}),
    }
)


def augment(case: Case) -> None:
    hyper = case.meta["hyper_parameters"]
    crop, size = hyper["crop_size"], (hyper["source_height"], hyper["source_width"])
    factor = hyper["long_side"] / max(size)
    scaled = int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)
    out = min(scaled[0], crop), min(scaled[1], crop)
    cut = Cut(scaled, (hyper["crop_y"], hyper["crop_x"]))
    geometry = Geometry(Window(0, 0, *size), out, hyper["hflip"], vflip=False, turns=0, cut=cut)

    pixels = case.tensors["in.image_uint8_hwc"].numpy()
    image = transform_image(pixels, geometry)
    valid = transform_mask(np.ones(size, np.bool_), geometry)
    mask = None
    if "out.mask" in case.tensors:
        label_map = LABEL_MAPS[hyper["dataset"].lower()]
        classes = max(index for index in label_map.values.values() if index != IGNORE_INDEX) + 1
        stored = case.tensors["in.mask_uint8"].numpy()[None]
        mask = transform_mask(LabelTable(label_map, classes).indices(stored, None, name=case.name), geometry)
    black = Scaling.of(rgb_task(), (0.0, 0.0, 0.0), torch.device("cpu"))
    samples = to_samples(collate([Crop(image, valid, mask, origin=pad_origin(geometry, crop))], crop), black)

    mean, std = (torch.tensor(hyper[name])[:, None, None] for name in ("mean", "std"))
    normalized = (samples.images[0] - mean) / std
    key = "out.image" if "out.image" in case.tensors else "out.image_weak"
    case.check(normalized, key)
    if samples.masks is not None:
        assert torch.equal(samples.masks[0], case.tensors["out.mask"])
    else:
        assert torch.equal(~samples.valid[0], case.tensors["out.ignore_mask"] == IGNORE_INDEX)


def cutmix_box(case: Case) -> None:
    for crop, area, aspect, x, y, width, height in case.tensors["table"].tolist():
        assert box_size(area, aspect, int(crop)) == (int(height), int(width))
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
    hyper, expected = case.meta["hyper_parameters"], case.meta["scalars"]
    segmenter = _Convolution(hyper["nclass"], hyper["multiplier"], case.group("param")).eval()
    config = EvalConfig(resize_multiple=hyper["multiplier"])
    matrix = ConfusionMatrix(hyper["nclass"])
    for i in range(len(hyper["sizes"])):
        prediction = predict_image(segmenter, case.tensors[f"in.image{i}"][0].float(), None, config, device="cpu")
        predicted = torch.from_numpy(prediction)
        wrong = int((predicted != case.tensors[f"out.pred{i}"][0]).sum())
        assert wrong <= case.meta["tolerance"]["pred_mismatched_pixels_max"]
        matrix.update(predicted, case.tensors[f"in.mask{i}"][0])
    names = segmenter.task.class_names
    atol = case.meta["tolerance"]["metric_atol"]

    def close(actual: float | None, wanted: float, scale: float = 100.0) -> None:
        assert actual is not None
        assert abs(scale * actual - wanted) <= atol * scale / 100

    everything = scores(matrix.counts, names)
    close(everything.variants["miou_absent_zero"], expected["training_eval_mIoU"])
    for entry, iou in zip(everything.classes, expected["training_eval_IoU"], strict=True):
        close(entry.iou, iou)
    for key in (key for key in expected if key.startswith("test_script_")):
        wanted, ignored = expected[key], _ignored(key, names)
        found: Scores = scores(matrix.counts, names, ignore=ignored)
        close(found.variants["miou_absent_zero"], wanted["mIoU"])
        close(found.variants["mf1_all_predictions"], wanted["mF1"])
        close(found.variants["kappa_all_predictions"], wanted["kappa"], scale=1.0)
        kept = [iou for name, iou in zip(names, wanted["IoU"], strict=True) if name not in ignored]
        for entry, iou in zip(found.classes, kept, strict=True):
            close(entry.iou, iou)


def _ignored(key: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """`test_script_ignore_class6` -> the name of class 6."""
    _, separator, index = key.partition("ignore_class")
    return (names[int(index)],) if separator else ()


HANDLERS: dict[str, Handler] = {"augment": augment, "cutmix_box": cutmix_box, "evaluator": evaluator}
