"""Harness of the golden cases: kinds, unread settings and results, rounding, generated tensors."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden import test_dasegnet, test_ktda, test_mtdf
from tests.golden.case import Case
from tests.golden.comparison import Comparison, Difference, explain
from tests.golden.derive import derive, exact_sum, fails, generator_rules, put, read, recorded, seeded, spoilt, write
from tests.golden.generated import Generator, evaluate, slices_in
from tests.golden.harness import GoldenWarning, case_paths, is_slow, kind_of, load_case, run_case, run_in_float64
from tests.golden.settings import Settings

DRIVERS = {"ktda": test_ktda.DRIVERS, "mtdf": test_mtdf.DRIVERS, "dasegnet": test_dasegnet.DRIVERS}
SECTIONS = ("hyper", "hyper_parameters", "module", "segmentor", "hook")
LARGE = ("real_student_fam_hash",)
ELSEWHERE = "RSSEG_GOLDENS" in os.environ
"""Cases of another origin may hold results that are not compared yet, which their own tests report."""
KNOWN = () if ELSEWHERE else tuple(DRIVERS)
CASES = [pytest.param(m, p, id=f"{m}-{p.stem}") for m in KNOWN for p in case_paths(m) if p.stem not in LARGE]
INPUTS = ("img", "gt_u8", ".student.", "pseudo_label")
RESULTS = (
    "out",
    "logits",
    "feat_",
    "grad",
    "after",
    "state_after",
    "end_",
    "ema.",
    "step",
    "loss_",
    "disc_out",
    "final",
)


@pytest.mark.parametrize(("method", "path"), CASES)
def test_a_driver_compares_every_result_and_reads_every_setting(method: str, path: Path, tmp_path: Path) -> None:
    meta, tensors = read(path)
    section = next((name for name in SECTIONS if isinstance(meta.get(name), dict)), None)
    if section is not None:
        meta[section]["unheard_of"] = 2
    # of predicted classes a few may differ
    results = [key for key in tensors if key.startswith(RESULTS) and not any(part in key for part in (*INPUTS, "pred"))]
    if results:
        key = results[len(path.stem) % len(results)]
        tensors[key] = spoilt(tensors[key])
    case = load_case(write(tmp_path / path.name, meta, tensors), DRIVERS[method])
    DRIVERS[method][case.kind](case)
    assert bool(case.comparison.differences) == bool(results)
    assert case.comparison.count
    assert not case.unread_results() + case.unread_sections()
    assert case.unread_settings() == ([] if section is None else [f"{section}.unheard_of"])


@pytest.mark.parametrize(
    "module",
    [
        "FAMX",
        "mmpretrain.ConvNeXtV3",
        "DistillEncoderDecoder (whole model) in half precision",
        "Swin-B + FAM at real size, grass geometry",
        {"type": "FAM2"},
    ],
)
def test_an_unknown_module_fails_even_if_it_begins_like_a_known_one(module: object, tmp_path: Path) -> None:
    fails(derive(recorded("ktda", "fam_small"), tmp_path, put("module", module)), test_ktda.DRIVERS)


def test_a_module_decides_over_a_name_that_begins_like_a_known_kind(tmp_path: Path) -> None:
    path = derive(recorded("mtdf", "ema_a"), tmp_path, put("module", "momentum encoder"), name="ema_b")
    fails(path, test_mtdf.DRIVERS, match="no driver")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dpt_head", "dpt_head"),
        ("dpt_head_a", "dpt_head"),
        ("dpt_head_of_something_else", "dpt_head"),
        ("dpt_headless_a", "dpt_headless_a"),
        ("ema_decoder_only_t", "ema"),
        ("model_a", "model"),
        ("models_a", "models_a"),
    ],
)
def test_without_a_module_whole_words_of_the_name_are_the_kind(name: str, kind: str) -> None:
    drivers = {**test_mtdf.DRIVERS, **test_dasegnet.DRIVERS}
    assert kind_of({}, name, drivers) == (kind, "")


def test_a_case_may_have_any_name_if_its_module_is_known(tmp_path: Path) -> None:
    run_case(derive(recorded("ktda", "neck_7"), tmp_path, name="zz_9"), test_ktda.DRIVERS)


def test_a_case_that_compares_nothing_fails(tmp_path: Path) -> None:
    fails(write(tmp_path / "idle.json", {}, {}), {"idle": lambda case: None}, match="compared nothing")


def test_a_result_that_nobody_compares_is_reported(tmp_path: Path) -> None:
    def driver(case: Case) -> None:
        case.check(case.tensors["in.x"], "out.x")

    meta = {"tolerance": {"rtol": 0.0, "atol": 0.0}}
    path = write(tmp_path / "some.json", meta, {"in.x": seeded(2), "out.x": seeded(2), "out.y": seeded(3)})
    with pytest.warns(GoldenWarning, match=r"not compared: out\.y"):
        run_case(path, {"some": driver})


def sum_driver(case: Case) -> None:
    case.check(case.tensors["in.x"].sum(), "out.sum")


@pytest.mark.parametrize(
    ("recorded_error", "passes"),
    [(1.5, True), (30.0, False)],
    ids=["recorded value off by rounding", "recorded value wrong"],
)
def test_a_recorded_value_outside_tolerance_of_float64(recorded_error: float, passes: bool, tmp_path: Path) -> None:
    x = 1e4 * seeded(10_000)
    own_error = abs(float(x.sum()) - exact_sum(x))
    tolerance = 2 * own_error  # so that ours is within it, by rounding alone
    side = 1 if float(x.sum()) < exact_sum(x) else -1
    value = torch.tensor(exact_sum(x) + side * recorded_error * tolerance, dtype=torch.float64)
    meta = {"tolerance": {"rtol": 0.0, "atol": tolerance}}
    path = write(tmp_path / "sum.json", meta, {"in.x": x, "out.sum": value})
    if passes:
        with pytest.warns(GoldenWarning, match="recorded ones are up to 1.50 tolerances away, ours 0.50"):
            run_case(path, {"sum": sum_driver})
    else:
        fails(path, {"sum": sum_driver}, match="sum")


def difference(actual: list[float], expected: list[float]) -> Difference:
    return Difference("x", torch.tensor(actual).double(), torch.tensor(expected).double(), rtol=0.0, atol=1.0)


def test_rounding_is_believed_only_where_it_is_small_and_rare() -> None:
    zeros = [0.0] * 199
    noisy = [0.5, *zeros[1:]]
    exact = torch.zeros(200, dtype=torch.float64)
    assert explain(difference([-0.5, *noisy], [1.5, *zeros]), exact, 0.5) is not None
    assert (
        explain(difference([1.5, *noisy], [-0.5, *zeros]), exact, 1.5) is not None
    )  # ours is off, not the recorded one
    assert explain(difference([1.5, *noisy], [-1.5, *zeros]), exact, 1.5) is None  # both are off
    assert explain(difference([20.0, *zeros], [0.0, *zeros]), exact, 20.0) is None  # ours is wrong
    assert explain(difference([-0.01, *zeros], [1.5, *zeros]), exact, 0.01) is None  # ours is much more exact
    assert explain(difference([-0.5] * 200, [1.5] * 200), exact, 0.5) is None  # all of them


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("ktda", "vit_p14"),
        ("ktda", "whole_h_fuse"),
        ("mtdf", "dinov2_a"),
        ("mtdf", "fusion_a"),
        ("dasegnet", "encode_decode_resnet"),
        ("dasegnet", "segformer_head"),
    ],
)
def test_networks_run_in_float64(method: str, name: str) -> None:
    """The code under test casts to float32 in places; nearly all results must still have float64 precision."""
    case, problem = run_in_float64(recorded(method, name), DRIVERS[method])
    assert case is not None, problem
    assert not case.comparison.differences
    values = [value for value in case.comparison.values.values() if value.numel() > 1]
    exact = [not torch.equal(value, value.float().double()) for value in values]
    assert sum(exact) > 0.7 * len(exact)


def test_rounding_of_a_scalar_is_compared_with_that_of_its_like() -> None:
    comparison = Comparison()
    comparison.close("scalar", -0.01, 1.2, atol=1.0)
    comparison.close("of the same tolerance", torch.tensor([0.5]), torch.tensor([0.0]), atol=1.0)
    comparison.close("of another", torch.tensor([0.9]), torch.tensor([0.0]), atol=2.0)
    exact = {label: torch.zeros_like(value) for label, value in comparison.values.items()}
    (only,) = comparison.differences
    assert comparison.noise(exact, only) == 0.5
    assert explain(only, exact["scalar"], 0.5) is not None


def test_where_nan_was_recorded_any_finite_value_is_accepted_and_said(tmp_path: Path) -> None:
    def driver(case: Case) -> None:
        case.check(torch.tensor([case.tensors["in.x"][0], 1.0]), "out.x")

    meta = {"tolerance": {"rtol": 0.0, "atol": 0.0}}
    out = torch.tensor([float("nan"), 1.0])
    with pytest.warns(GoldenWarning, match="NaN"):
        run_case(write(tmp_path / "a.json", meta, {"in.x": torch.tensor([2.0]), "out.x": out}), {"a": driver})
    fails(write(tmp_path / "a.json", meta, {"in.x": torch.tensor([float("inf")]), "out.x": out}), {"a": driver})


def test_settings_know_what_was_read() -> None:
    settings = Settings({"seed": 1, "a": {"b": 1, "c": [{"d": 2}, {"d": 3}]}, "none": None, "e": 4})
    assert settings.unread() == ["a", "e"]
    assert settings["a"]["c"][0]["d"] == 2
    assert "e" in settings
    assert settings.unread() == ["a.b", "a.c[1].d", "e"]
    settings.expect("e", 3, 4)
    settings.expect("absent", 5)
    with pytest.raises(AssertionError, match=r"a\.b"):
        settings["a"].expect("b", 2)


@pytest.mark.parametrize(
    ("tolerance", "what", "expected"),
    [
        ("exact", "forward", (0.0, 0.0)),
        ({"rtol": 1e-4, "atol": 1e-5}, "grad", (1e-4, 1e-5)),
        ({"rtol": 1e-4, "grad_rtol": 1e-3, "grad_atol": 1e-2}, "grad", (1e-3, 1e-2)),
        ({"forward": {"rtol": 1e-4}, "grad": {"atol": 1e-5}}, "grad", (0.0, 1e-5)),
        ({"forward": {"rtol": 1e-4}, "grad": {"atol": 1e-5}}, "loss", (1e-4, 0.0)),
    ],
)
def test_tolerances_in_every_form(tolerance: object, what: str, expected: tuple[float, float], tmp_path: Path) -> None:
    case = load_case(write(tmp_path / "a.json", {"tolerance": tolerance}, {}), {})
    assert tuple(case.tolerance(what).values()) == expected


def test_generated_tensors_follow_the_rules_that_a_case_states() -> None:
    generator = Generator(generator_rules(), 7)
    assert generator.parameter("bn.num_batches_tracked", torch.tensor(3)).item() == 0
    variance = generator.parameter("bn.running_var", torch.empty(1000))
    assert variance.min() >= 0.5
    assert variance.max() < 1.5
    assert generator.parameter("gamma", torch.empty(2)).tolist() == pytest.approx([0.1, 0.1])
    weight = generator.parameter("conv.weight", torch.empty(4, 25))
    assert weight.abs().max() <= 0.2
    assert not torch.equal(weight, Generator(generator_rules(), 8).parameter("conv.weight", torch.empty(4, 25)))
    assert generator.input("image", (1, 3, 8, 8)).std() == pytest.approx(1, abs=0.1)
    assert set(generator.input("label", (50,)).tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("steps.1", "for element index i = 1..n in row-major order: x = (i*2654435761 + s*40507) mod 2^32"),
        ("rules_in_order.2", "key rhymes with gamma: 0.1"),
        ("input_rule", "as in the paper"),
    ],
)
def test_a_rule_that_is_not_understood_fails(path: str, value: str) -> None:
    changed = generator_rules()
    put(path, value)(changed, {})
    with pytest.raises(AssertionError):
        Generator(changed, 7)


def test_arithmetic_and_nothing_else_is_evaluated() -> None:
    names = {"u": np.array([0.25]), "n": 4, "shape": (2, 2)}
    assert evaluate("0.9/sqrt(n/shape[0])*u", names) == pytest.approx(0.9 / 2**0.5 / 4)
    for text in ("__import__('os')", "u.size", "[u for u in n]", "open"):
        with pytest.raises(AssertionError):
            evaluate(text, names)


def test_slices_are_read_from_the_description_of_the_keys() -> None:
    found = slices_in("out.a.i: normed [:, ::16, ::2]; out.b_full is subsampled [::4, ::4] after a resize; out.c: all")
    assert set(found) == {"out.a", "out.b_full"}
    assert found["out.a"] == (slice(None), slice(None, None, 16), slice(None, None, 2))
    assert found["out.b_full"] == (slice(None, None, 4), slice(None, None, 4))


@pytest.mark.parametrize(
    ("module", "side", "slow"),
    [
        ("ConvNeXt-B + FAM at real size, grass geometry", 256, False),
        ("ViT-B/14 teacher at real size, cloud geometry", 512, True),
        ("whole model at real size, grass", 256, True),
    ],
)
def test_networks_of_real_size_are_slow(module: str, side: int, slow: bool, tmp_path: Path) -> None:
    meta = {"generator": {}, "module": module, "input_shape": [1, 3, side, side]}
    assert is_slow(write(tmp_path / "a.json", meta, {})) == slow
    assert not is_slow(write(tmp_path / "b.json", {"module": module}, {}))
