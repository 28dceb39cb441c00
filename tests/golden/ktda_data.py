"""Handlers of golden cases: photometric distortion and what reaches the first layer."""

import numpy as np
import torch

from rsseg.data.assembly import Crop, collate
from rsseg.data.photometric import PhotometricDraws, photometric_distortion
from rsseg.data.streams import Scaling, to_samples
from tests.conftest import rgb_task
from tests.golden.harness import Case, Handler

MEAN = torch.tensor((123.675, 116.28, 103.53)) / 255
STD = torch.tensor((58.395, 57.12, 57.375)) / 255


def scripted_draws(integers: list[int], uniforms: list[float]) -> PhotometricDraws:
    """Replay a recorded sequence in the order of the published code."""
    integer, uniform = iter(integers), iter(uniforms)
    brightness = next(uniform) if next(integer) else None
    contrast_first = next(integer) == 1
    contrast = next(uniform) if contrast_first and next(integer) else None
    saturation = next(uniform) if next(integer) else None
    hue = next(integer) if next(integer) else None
    if not contrast_first:
        contrast = next(uniform) if next(integer) else None
    return PhotometricDraws(brightness, contrast, contrast_first, saturation, hue)


def photometric(case: Case) -> None:
    image = case.tensors["in.bgr_hwc"].flip(-1).contiguous().numpy()
    for number, chain in enumerate(case.meta["chains"]):
        draws = scripted_draws(chain["randint_sequence"], chain["uniform_sequence"])
        expected = case.tensors[f"out.{number}"].flip(-1).numpy()
        np.testing.assert_array_equal(
            photometric_distortion(image, draws), expected, err_msg=f"chain {number}: {draws}"
        )


def preprocessor(case: Case) -> None:
    images, labels = case.sequence("in.bgr_uint8"), case.sequence("in.label")
    crops = [
        Crop(
            image=image.flip(0).permute(1, 2, 0).numpy(),
            valid=np.ones(image.shape[1:], np.bool_),
            mask=label[0].to(torch.uint8).numpy(),
        )
        for image, label in zip(images, labels, strict=True)
    ]
    scaling = Scaling.of(rgb_task(), MEAN.tolist(), torch.device("cpu"))
    samples = to_samples(collate(crops, case.meta["hyper"]["size"][0]), scaling)
    case.check((samples.images - MEAN[:, None, None]) / STD[:, None, None], "out.batch")
    assert samples.masks is not None
    assert torch.equal(samples.masks[:, None], case.tensors["out.label"])


HANDLERS: dict[str, Handler] = {
    "PhotoMetricDistortion with scripted random draws": photometric,
    "SegDataPreProcessor, training": preprocessor,
}
