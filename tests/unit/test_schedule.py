import pytest

from rsseg.config import ScheduleConfig
from rsseg.training.step import lr_at

GRASS = ScheduleConfig(warmup_steps=1150, decay_begin=1150)
CLOUD = ScheduleConfig(warmup_steps=2000, decay_begin=1000)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 6e-7),
        (100, 5.276710e-5),
        (1149, 6e-4),
        (1150, 6e-4),
        (1151, 5.999753e-4),
        (5000, 5.039488e-4),
        (11500, 3.367107e-4),
        (20000, 1.004481e-4),
        (22770, 9.92007e-6),
        (22999, 0.0),
    ],
)
def test_grass_schedule_has_the_published_rates(step: int, rate: float) -> None:
    assert lr_at(GRASS, 6e-4, step, 23000) == pytest.approx(rate, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 6e-7),
        (1000, 3.004499e-4),
        (1500, 4.478086e-4),
        (1999, 5.931670e-4),
        (2001, 5.931533e-4),
        (40000, 3.251891e-4),
        (79999, 0.0),
    ],
)
def test_cloud_schedule_multiplies_overlapping_warmup_and_decay(step: int, rate: float) -> None:
    assert lr_at(CLOUD, 6e-4, step, 80000) == pytest.approx(rate, rel=1e-6, abs=1e-12)


def test_mmcv_style_reaches_one_at_the_end_of_warmup_and_zero_one_step_after_the_last() -> None:
    config = ScheduleConfig(warmup_steps=800, warmup_start=1e-6, warmup_style="mmcv", power=1.0)
    assert lr_at(config, 6e-5, 0, 40000) == pytest.approx(6e-11)
    assert lr_at(config, 6e-5, 400, 40000) == pytest.approx(2.9700029700000004e-05)
    assert lr_at(config, 6e-5, 800, 40000) == pytest.approx(6e-5 * (1 - 800 / 40000))
    assert lr_at(config, 6e-5, 39999, 40000) == pytest.approx(6e-5 / 40000)


def test_lag_repeats_the_first_rate() -> None:
    config = ScheduleConfig(lag=1, warmup_style="mmcv")
    rates = [lr_at(config, 1.0, step, 300) for step in range(3)]
    assert rates == pytest.approx([1.0, 1.0, (1 - 1 / 300) ** 0.9])


def test_decay_ends_at_min_lr_and_constant_stays() -> None:
    assert lr_at(ScheduleConfig(min_lr=1e-5), 1e-3, 99, 100) == pytest.approx(1e-5)
    assert lr_at(ScheduleConfig(decay="cosine"), 1e-3, 99, 100) == pytest.approx(0, abs=1e-12)
    assert lr_at(ScheduleConfig(decay="constant"), 1e-3, 99, 100) == 1e-3


@pytest.mark.parametrize("total", [1, 2])
def test_shortest_runs_have_a_rate(total: int) -> None:
    for config in (ScheduleConfig(), ScheduleConfig(warmup_steps=1), ScheduleConfig(decay_begin=5, warmup_steps=9)):
        assert lr_at(config, 1e-3, total - 1, total) >= 0
    assert lr_at(ScheduleConfig(), 1e-3, 0, total) == 1e-3
