"""Cases derived from KTDA's recorded ones: each passes, and fails with a wrong value."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rsseg.data.streams import Samples
from rsseg.methods.ktda.importer import rename_tensors
from rsseg.methods.ktda.method import KTDAMethod
from tests.golden.case import Case, Tensors
from tests.golden.derive import (
    Edit,
    Meta,
    derive,
    drop,
    fails,
    generator_rules,
    one_wrong,
    put,
    read,
    recorded,
    spoil,
    statistics_of,
    write,
)
from tests.golden.generated import Generator
from tests.golden.harness import load_case, run_case
from tests.golden.ktda_generated import published_method, reference_names
from tests.golden.ktda_networks import load_backbone
from tests.golden.ktda_whole import described_method, image_of, label_of, loaded_method, step_output
from tests.golden.settings import Settings
from tests.golden.test_ktda import DRIVERS


def narrow(width: int) -> Edit:
    """Inputs, labels and outputs of the preprocessor cut to a width, so that the size is not square."""

    def edit(meta: Meta, tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key] = tensors[key][..., :width]
        meta["hyper"]["size"] = [tensors["out.batch"].shape[-2], width]

    return edit


@pytest.mark.parametrize(
    "edits",
    [
        (narrow(24),),
        (narrow(24), put("hyper.size", None), put("hyper.size_divisor", 8)),
        (narrow(24), put("hyper.mean", [123.675, 116.28, 103.53]), put("hyper.std", [58.395, 57.12, 57.375])),
    ],
    ids=["size", "divisor", "statistics"],
)
def test_preprocess_to_a_size_that_is_not_square(edits: tuple[Edit, ...], tmp_path: Path) -> None:
    source = recorded("ktda", "preprocess")
    run_case(derive(source, tmp_path, *edits), DRIVERS)
    fails(derive(source, tmp_path, *edits, spoil("out.batch")), DRIVERS, match=r"out\.batch")
    fails(derive(source, tmp_path, *edits, spoil("out.label")), DRIVERS, match=r"out\.label")


def test_preprocess_without_padding_outside_of_training(tmp_path: Path) -> None:
    def keep_first(meta: Meta, tensors: dict[str, Tensor]) -> None:
        height, width = tensors["in.label.0"].shape[-2:]
        for key in ("in.bgr_uint8.1", "in.label.1"):
            del tensors[key]
        for key in ("out.batch", "out.label"):
            tensors[key] = tensors[key][:1, ..., :height, :width]
        meta["module"] = "SegDataPreProcessor, test"

    source = recorded("ktda", "preprocess")
    run_case(derive(source, tmp_path, keep_first, put("hyper", {})), DRIVERS)
    fails(derive(source, tmp_path, keep_first, put("module", "SegDataPreProcessor, sleeping")), DRIVERS)


def last_map_only(meta: Meta, tensors: dict[str, Tensor]) -> None:
    """Keep the last of four maps."""
    for key in [key for key in tensors if key.startswith("out.") and key[-1] in "012" and "pos" not in key]:
        del tensors[key]


def only_one_returned(meta: Meta, tensors: dict[str, Tensor]) -> None:
    """Make the network return the last map only."""
    last_map_only(meta, tensors)
    meta["hyper"]["out_indices"] = [11]
    for key in [key for key in tensors if key.startswith("out.") and key.endswith(".3")]:
        tensors[f"{key[:-1]}0"] = tensors.pop(key)


@pytest.mark.parametrize(
    ("edit", "key"), [(last_map_only, "out.1.3"), (only_one_returned, "out.1.0")], ids=["stored", "returned"]
)
def test_teacher_of_which_the_last_map_alone_is_recorded(edit: Edit, key: str, tmp_path: Path) -> None:
    source = recorded("ktda", "vit_p14")
    run_case(derive(source, tmp_path, edit), DRIVERS)
    fails(derive(source, tmp_path, edit, spoil(key)), DRIVERS, match=key)
    fails(derive(source, tmp_path, edit, put("hyper.final_norm", False)), DRIVERS)


WHOLE = "whole_h_fuse"


def without(*sections: str) -> Edit:
    def edit(meta: Meta, _tensors: dict[str, Tensor]) -> None:
        for section in sections:
            del meta[section]

    return edit


@pytest.mark.parametrize(
    "edits",
    [
        (drop("grad."),),
        (drop("grad."), without("grad_norm_by_loss", "trajectory"), drop("after.", "out.eval_logits_after")),
    ],
    ids=["norms and steps", "norms"],
)
def test_whole_model_with_norms_in_place_of_gradients(edits: tuple[Edit, ...], tmp_path: Path) -> None:
    source = recorded("ktda", WHOLE)
    run_case(derive(source, tmp_path, *edits), DRIVERS)
    fails(derive(source, tmp_path, *edits, put("grad_norm_total_loss.fam", 14.9)), DRIVERS, match="norm of fam")
    fails(derive(source, tmp_path, *edits, put("grad_norm_total_loss.teach_backbone", 1.0)), DRIVERS)


def test_whole_model_with_fewer_steps(tmp_path: Path) -> None:
    def shorten(meta: Meta, tensors: dict[str, Tensor]) -> None:
        del meta["trajectory"][2:]
        meta["optimiser"]["steps"] = 2

    source = recorded("ktda", WHOLE)
    edits = (shorten, drop("after.", "out.eval_logits_after"))
    run_case(derive(source, tmp_path, *edits), DRIVERS)
    fails(derive(source, tmp_path, *edits, put("trajectory.1.loss", 1.0)), DRIVERS, match="step 1 loss")


@pytest.mark.parametrize("passes", [1, 2])
def test_averages_of_a_whole_model_without_steps(passes: int, tmp_path: Path) -> None:
    source = recorded("ktda", WHOLE)
    case = load_case(source, DRIVERS)
    method = loaded_method(case)
    for _ in range(passes):
        step_output(case, method)
    state = method.state_dict()
    own = {name.removeprefix("segmenter."): tensor for name, tensor in state.items()}
    names = reference_names(own)

    def averages(meta: Meta, tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.startswith("after.")]:
            del tensors[key]
        tensors |= {f"after.{names[n]}": t for n, t in own.items() if ".bn." in n and ("running" in n or "num" in n)}

    edits = (averages, without("trajectory", "grad_norm_by_loss"), drop("grad.", "out.eval_logits_after"))
    run_case(derive(source, tmp_path, *edits), DRIVERS)
    key = "after.decode_head.bottleneck.bn.running_var"
    fails(derive(source, tmp_path, *edits, spoil(key)), DRIVERS, match="running_var")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("hyper.alpha", 0.6),
        ("hyper.fam.output_size", 8),
        ("hyper.backbone.use_transformer", True),
        ("hyper.backbone.gap_before_final_norm", True),
        ("hyper.decode_head.norm_cfg.type", "GN"),
        ("hyper.decode_head.loss_decode.class_weight", [1, 2, 1, 1, 1]),
        ("hyper.test_cfg.mode", "slide"),
        ("optimiser.clip", 1.0),
    ],
)
def test_a_changed_setting_of_a_whole_model_fails(path: str, value: object, tmp_path: Path) -> None:
    fails(derive(recorded("ktda", WHOLE), tmp_path, put(path, value)), DRIVERS)


def generated_case(folder: Path) -> tuple[Meta, dict[str, Tensor]]:
    """The recorded whole model with generated parameters, and results as slices and statistics.

    The expected values come from the parameters under the reference's names, loaded by the importer.
    """
    meta, tensors = read(recorded("ktda", WHOLE))
    rules = generator_rules()
    kept = {key: meta[key] for key in ("case", "module", "hyper")}
    meta = kept | {
        "generator": rules,
        "case_number": 12,
        "input_shape": [2, 3, 96, 96],
        "keys": "out.teacher.i: maps [:, ::4]; out.eval_logits_full: [::4, ::4] after a resize",
        "tolerance": {"forward": {"rtol": 1e-3, "atol": 1e-4}, "losses": {"rtol": 1e-3}},
    }
    case = load_case(write(folder / "expected.json", meta, {}), DRIVERS)
    method = described_method(case)
    generator = Generator(rules, 12)
    stored = {key[3:]: generator.parameter(key[3:], value) for key, value in tensors.items() if key.startswith("sd.")}
    load_reference(method, stored)
    method.eval()
    images = generator.input("image", (2, 3, 96, 96))
    segmenter = method.segmenter
    assert method.distillation
    with torch.no_grad():
        run = segmenter.run(images)
        teacher = method.distillation.teacher_maps(images)
        full = segmenter(images)
    outputs = {f"out.teacher.{i}": level[:, ::4] for i, level in enumerate(teacher)}
    outputs["out.eval_logits_full"] = full[..., ::4, ::4]
    meta["statistics"] = {"out.eval_logits": statistics_of(run.logits), "out.feat.0": statistics_of(run.features[0])}
    meta["self_check"] = {"backbone.norm3.weight[:2]": stored["backbone.norm3.weight"][:2].tolist()}
    meta["losses_eval"] = eval_losses(case, method)
    return meta, outputs


def load_reference(method: KTDAMethod, stored: dict[str, Tensor], *, strict: bool = True) -> None:
    """Load a checkpoint with the reference's names; without `strict`, the teacher only."""
    renamed = rename_tensors(stored)
    assert method.distillation
    if strict:
        load_backbone(method.segmenter, renamed.segmenter)
        load_backbone(method.aux_heads, renamed.aux_heads)
    load_backbone(method.distillation.teacher.module, renamed.teacher)


def eval_losses(case: Case, method: KTDAMethod) -> dict[str, float]:
    masks = label_of(case)
    samples = Samples(image_of(case), torch.ones_like(masks, dtype=torch.bool), masks)
    with torch.no_grad():
        losses = method.eval()({"labeled": samples}, 0).losses
    return {"decode.loss_ce": float(losses["seg"]), "distill_loss": float(losses["distill"])}


def test_whole_model_of_which_parameters_are_rules_and_results_statistics(tmp_path: Path) -> None:
    meta, tensors = generated_case(tmp_path)
    run_case(write(tmp_path / "generated.json", meta, tensors), DRIVERS)

    def wrong(*edits: Edit) -> Path:
        changed, copies = generated_case(tmp_path)
        for edit in edits:
            edit(changed, copies)
        return write(tmp_path / "generated.json", changed, copies)

    statistics: dict[str, Any] = meta["statistics"]
    spoilt = put("statistics", statistics | {"out.feat.0": one_wrong(statistics["out.feat.0"])})
    fails(wrong(spoilt), DRIVERS, match=r"out\.feat\.0 abs_mean")
    fails(wrong(spoil("out.teacher.3")), DRIVERS, match=r"out\.teacher\.3")
    fails(wrong(put("losses_eval", {"distill_loss": 1.0})), DRIVERS, match="distill_loss")
    fails(wrong(put("generator.rules_in_order.3", "key ends with running_var: 2+u")), DRIVERS)
    fails(wrong(put("self_check", {"backbone.norm3.weight[:2]": [0.0, 0.0]})), DRIVERS, match="self check")
    fails(wrong(put("case_number", 13)), DRIVERS)


def test_learning_rates_of_the_other_published_recipe(tmp_path: Path) -> None:
    """Warm-up and decay overlap there; the rates are those of the published schedulers to six digits."""
    rates = {0: 6e-7, 1000: 3.004499e-4, 1500: 4.478086e-4, 1999: 5.931670e-4, 40000: 3.251891e-4, 79999: 0.0}

    def change(meta: Meta, tensors: dict[str, Tensor]) -> None:
        meta |= {"iterations": 80000, "peak": {"lr": 5.93167e-4, "iteration": 1999}, "tolerance": {"rtol": 1e-6}}
        tensors["in.iteration"] = torch.tensor(list(rates))
        tensors["out.lr"] = torch.tensor(list(rates.values()), dtype=torch.float64)

    source = recorded("ktda", "lr_schedule_grass")
    run_case(derive(source, tmp_path, change, name="lr_schedule_cloud"), DRIVERS)
    fails(derive(source, tmp_path, change, name="lr_schedule_grass"), DRIVERS)
    fails(derive(source, tmp_path, change, spoil("out.lr"), name="lr_schedule_cloud"), DRIVERS)


def test_names_of_the_other_published_checkpoint(tmp_path: Path) -> None:
    """It differs in the number of classes only."""

    def four_classes(meta: Meta, _tensors: dict[str, Tensor]) -> None:
        for name, shape, _ in meta["entries"]:
            if "conv_seg" in name:
                shape[0] = 4

    source = recorded("ktda", "state_dict_keys_grass")
    run_case(derive(source, tmp_path, four_classes, name="state_dict_keys_cloud"), DRIVERS)
    wrong = put("entries.0.1", [128, 4, 4, 4])
    fails(derive(source, tmp_path, four_classes, wrong, name="state_dict_keys_cloud"), DRIVERS)


def test_every_name_of_a_published_checkpoint_is_found_from_ours() -> None:
    """The names that generated parameters need, for all 820 tensors of the published model."""
    meta, _ = read(recorded("ktda", "state_dict_keys_grass"))
    case = Case("x", "at real size", "grass", Settings({}), Tensors({}))
    with torch.device("meta"):
        method = published_method(case)
    assert method.distillation
    own = [*method.segmenter.state_dict(), *(f"aux_heads.{name}" for name in method.aux_heads.state_dict())]
    own += [f"teacher.{name}" for name in method.distillation.teacher.module.state_dict()]
    found = reference_names(own)
    assert sorted(found.values()) == sorted(name for name, _, _ in meta["entries"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "results"),
    [("whole model", ("out.eval_logits", "out.feat.2")), ("ViT-B/14 teacher", ("out.teacher.3",))],
)
def test_published_networks_of_real_size_with_generated_parameters(
    module: str, results: tuple[str, ...], tmp_path: Path
) -> None:
    """The published model, batch norm's averages and counters included, and its teacher's last map, at 256 pixels."""
    entries, _ = read(recorded("ktda", "state_dict_keys_grass"))
    meta: Meta = {
        "module": f"{module} at real size, grass geometry",
        "generator": generator_rules(),
        "case_number": 9,
        "input_shape": [1, 3, 256, 256],
        "tolerance": {"forward": {"rtol": 1e-3, "atol": 1e-3}, "losses": {"rtol": 1e-3}},
    }
    case = load_case(write(tmp_path / "expected.json", meta, {}), DRIVERS)
    method = published_method(case)
    generator = Generator(generator_rules(), 9)
    stored = {
        name: generator.parameter(name, torch.empty(shape, dtype=getattr(torch, dtype)))
        for name, shape, dtype in entries["entries"]
        if module == "whole model" or name.startswith("teach_backbone.")
    }
    load_reference(method, stored, strict=module == "whole model")
    images = generator.input("image", (1, 3, 256, 256))
    method.eval()
    assert method.distillation
    with torch.no_grad():
        if module == "whole model":
            run = method.segmenter.run(images)
            made = {"out.eval_logits": run.logits, "out.feat.2": run.features[2]}
            meta["losses"] = eval_losses(case, method)
        else:
            made = {"out.teacher.3": method.distillation.teacher_maps(images)[3]}
    del method, stored
    meta["statistics"] = {key: statistics_of(made[key]) for key in results}
    wrong = results[0]
    meta["statistics"][wrong] = one_wrong(meta["statistics"][wrong])
    real = load_case(write(tmp_path / "real.json", meta, {}), DRIVERS)
    DRIVERS[real.kind](real)
    # generating the parameters takes long, so one run must show that right values pass and a wrong one fails
    assert [difference.label for difference in real.comparison.differences] == [f"{wrong} abs_mean"]
    assert real.comparison.count == 5 * len(results) + len(meta.get("losses", {}))
