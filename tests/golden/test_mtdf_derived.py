"""Cases derived from RS-MTDF's recorded ones: each passes, and fails with a wrong value."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.golden.derive import Edit, Meta, derive, drop, fails, put, recorded, spoil
from tests.golden.harness import GoldenWarning, run_case
from tests.golden.test_mtdf import DRIVERS


def test_whole_model_with_norms_in_place_of_gradients(tmp_path: Path) -> None:
    source = recorded("mtdf", "model_a")
    edits = (drop("grad."), drop("out.head_in", "out.x_clip_input"))
    run_case(derive(source, tmp_path, *edits, name="model_b"), DRIVERS)
    name = "head.scratch.output_conv.2.bias"

    def change(meta: Meta, _tensors: dict[str, Tensor]) -> None:
        meta["scalars"]["grad_norms"][name] *= 1.1

    fails(derive(source, tmp_path, *edits, change), DRIVERS, match=r"predict\.2\.bias")


def test_whole_model_with_gradients_alone(tmp_path: Path) -> None:
    def no_norms(meta: Meta, _tensors: dict[str, Tensor]) -> None:
        del meta["scalars"]["grad_norms"]

    source = recorded("mtdf", "model_a")
    run_case(derive(source, tmp_path, no_norms), DRIVERS)
    fails(derive(source, tmp_path, no_norms, spoil("grad.project_dino.weight")), DRIVERS, match="project")


def last_map_only(meta: Meta, tensors: dict[str, Tensor]) -> None:
    """Keep the last of four maps."""
    for key in [key for key in tensors if key.startswith("out.") and "tap" in key and key[-1] != "3"]:
        del tensors[key]


def only_one_returned(meta: Meta, tensors: dict[str, Tensor]) -> None:
    """Make the network return the last map only, and drop gradients, which are those of all maps."""
    last_map_only(meta, tensors)
    meta["hyper_parameters"]["taps"] = [3]
    for key in [key for key in tensors if key.startswith("grad.") or "cotangent" in key]:
        del tensors[key]
    for key in [key for key in tensors if key.endswith(".tap3")]:
        tensors[f"{key[:-1]}0"] = tensors.pop(key)


@pytest.mark.parametrize(
    ("edit", "key"),
    [(last_map_only, "out.70x112.tap3"), (only_one_returned, "out.70x112.tap0")],
    ids=["stored", "returned"],
)
def test_teacher_of_which_the_last_map_alone_is_recorded(edit: Edit, key: str, tmp_path: Path) -> None:
    source = recorded("mtdf", "dinov2_a")
    run_case(derive(source, tmp_path, edit, name="dinov2_b"), DRIVERS)
    fails(derive(source, tmp_path, edit, spoil(key)), DRIVERS, match=key)
    fails(derive(source, tmp_path, edit, drop("out.98x98.tap", "out.70x112.tap", "out.168x126.tap")), DRIVERS)


@pytest.mark.parametrize(
    ("source", "prefixes", "key"),
    [
        ("dpt_head_a", ("grad.", "in.cotangent", "out.path", "out.layer"), "out.logits"),
        ("translator_distill_a", ("grad.",), "out.loss_clip"),
        ("fusion_a", ("gradfused.", "in.cotangent"), "out.fused"),
        ("fusion_a", ("graddistill.",), "gradfused.in.tap3"),
        ("clip_patch_a", ("negative.",), "out.patch_tokens"),
        ("unsup_a", ("grad.",), "out.loss_u_s"),
        ("evaluator_a", ("out.logits",), None),
    ],
)
def test_a_part_with_fewer_results(source: str, prefixes: tuple[str, ...], key: str | None, tmp_path: Path) -> None:
    run_case(derive(recorded("mtdf", source), tmp_path, drop(*prefixes)), DRIVERS)
    if key is not None:
        fails(derive(recorded("mtdf", source), tmp_path, drop(*prefixes), spoil(key)), DRIVERS)


def test_fewer_steps_of_one_optimizer(tmp_path: Path) -> None:
    def shorten(meta: Meta, tensors: dict[str, Tensor]) -> None:
        del meta["hyper_parameters"]["optimizers"]["adamw"]
        del meta["scalars"]["sgd"]["steps"][2:]

    source, edits = recorded("mtdf", "trajectory_3steps"), (shorten, drop("end_"))
    run_case(derive(source, tmp_path, *edits, name="trajectory_2steps"), DRIVERS)
    fails(derive(source, tmp_path, *edits, put("scalars.sgd.steps.1.loss", 2.0)), DRIVERS, match="sgd step 1 loss")


def test_a_batch_whose_every_pixel_is_ignored(tmp_path: Path) -> None:
    """The original divides by zero; ours is finite, and what else is recorded is compared."""

    def ignore_all(meta: Meta, tensors: dict[str, Tensor]) -> None:
        for key in ("in.ignore_mask", "out.ignore_mixed"):
            tensors[key] = torch.full_like(tensors[key], 255)
        for key in ("out.loss_u_s", "out.loss", "out.mask_ratio", "grad.pred_labelled_then_strong"):
            tensors[key] = torch.full_like(tensors[key], float("nan"))
        meta["scalars"] = {"loss_x": meta["scalars"]["loss_x"]}
        meta["hyper_parameters"]["padding_bottom_right"] = [[0, 0]] * meta["hyper_parameters"]["batch_unlabelled"]

    source = recorded("mtdf", "unsup_a")
    with pytest.warns(GoldenWarning, match="NaN"):
        run_case(derive(source, tmp_path, ignore_all), DRIVERS)
    fails(derive(source, tmp_path, ignore_all, spoil("out.loss_x")), DRIVERS, match="loss_x")


@pytest.mark.parametrize(
    ("source", "path", "value"),
    [
        ("dinov2_a", "hyper_parameters.antialias", True),
        ("dinov2_a", "hyper_parameters.interpolate_offset", 0.0),
        ("clip_patch_a", "hyper_parameters.activation", "GELU"),
        ("dpt_head_a", "hyper_parameters.use_bn", True),
        ("dpt_head_a", "hyper_parameters.batch", 3),
        ("fusion_a", "hyper_parameters.weights", [0.7, 0.2, 0.1]),
        ("model_a", "hyper_parameters.fusion", [0.7, 0.1, 0.1]),
        ("ema_a", "hyper_parameters.rule", "r=min(1-1/(iter+1),0.99); ema=ema*r+param*(1-r)"),
        ("ema_a", "hyper_parameters.rule", "r=0.99"),
        ("unsup_a", "hyper_parameters.boxes_y_x_h_w.0", [2, 3, 9, 12]),
        ("cutmix_box_a", "hyper_parameters.size_range", [0.1, 0.4]),
        ("augment_a_loveda_labelled", "hyper_parameters.mode", "train_s"),
        ("augment_a_loveda_labelled", "hyper_parameters.crop_x", 1),
        ("augment_b_potsdam_unlabelled", "hyper_parameters.dataset", "vaihingen"),
        ("evaluator_a", "scalars.test_script_ignore_class6.kappa", 0.6),
        ("evaluator_a", "hyper_parameters.multiplier", 28),
    ],
)
def test_a_changed_setting_fails(source: str, path: str, value: object, tmp_path: Path) -> None:
    fails(derive(recorded("mtdf", source), tmp_path, put(path, value)), DRIVERS)


def test_an_image_that_is_only_normalized(tmp_path: Path) -> None:
    """Validation: no draws, the whole image, not square."""

    def whole(meta: Meta, tensors: dict[str, Tensor]) -> None:
        hyper = meta["hyper_parameters"]
        for key in ("crop_size", "long_side", "crop_x", "crop_y", "hflip", "resize_range"):
            del hyper[key]
        hyper["mode"] = "val"
        pixels = tensors["in.image_uint8_hwc"].permute(2, 0, 1).double() / 255
        mean, std = (torch.tensor(hyper[key]).double()[:, None, None] for key in ("mean", "std"))
        tensors["out.image"] = ((pixels - mean) / std).float()
        stored = tensors["in.mask_uint8"].long()
        tensors["out.mask"] = torch.where(stored == 0, 255, stored - 1)

    source = recorded("mtdf", "augment_a_loveda_labelled")
    run_case(derive(source, tmp_path, whole), DRIVERS)
    fails(derive(source, tmp_path, whole, spoil("out.image")), DRIVERS, match="image")
    fails(derive(source, tmp_path, whole, spoil("out.mask")), DRIVERS, match="mask")


def test_a_mask_with_three_equal_channels(tmp_path: Path) -> None:
    def three(meta: Meta, tensors: dict[str, Tensor]) -> None:
        tensors["in.mask_uint8"] = tensors["in.mask_uint8"][..., None].repeat(1, 1, 3)

    run_case(derive(recorded("mtdf", "augment_a_loveda_labelled"), tmp_path, three), DRIVERS)
