import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.ddp_worker import state_file, train

HANGING_S = 15.0
"""Far above the second that it takes, far below the minutes that a process group waits for a lost process."""


LOSSES = {"toy": 2, "dasegnet": 6, "supervised": 1, "ktda": 4, "mtdf": 3}


def in_two_processes(*worker: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *worker], env=environment, capture_output=True, text=True, check=False, timeout=400
    )


@pytest.mark.parametrize(
    ("case", "rtol", "atol"),
    [
        ("toy", 1e-10, 1e-12),
        ("dasegnet", 1e-4, 1e-6),
        ("supervised", 1e-4, 1e-6),
        ("ktda", 1e-4, 1e-6),
        ("mtdf", 1e-4, 1e-6),
    ],
)
def test_two_processes_with_accumulation_equal_one_process(case: str, rtol: float, atol: float, tmp_path: Path) -> None:
    """Also if two processes resume what one began, the reverse, and if they share the parameters."""
    torch.set_num_threads(1)
    train(tmp_path, 4, case)
    done = in_two_processes("-m", "tests.training.ddp_worker", str(tmp_path), "2", case)
    assert done.returncode == 0, done.stderr[-3000:]
    train(tmp_path, 4, case, resume=state_file(tmp_path, "2", 2))
    for way in ("2", "shared-2"):
        first, second = (load_file(tmp_path / f"{way}-{rank}.safetensors") for rank in (0, 1))
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == [], "ranks score what ships"
    states = [load_file(state_file(tmp_path, kind, 2)) for kind in ("2", "shared")]
    assert len({tuple((name, t.shape, t.dtype) for name, t in state.items()) for state in states}) == 1
    one = load_file(tmp_path / "1.safetensors")
    # running statistics follow the images that each process sees; they are the main process's
    compared = [name for name in one if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert sum(name.startswith("loss.") for name in compared) == LOSSES[case]
    for other in ("2", "resumed-1", "resumed-2", "shared-2", "shared-resumed-2"):
        two = load_file(tmp_path / f"{other}.safetensors")
        assert one.keys() == two.keys()
        for name in compared:
            single = name.startswith("loss.")  # logged in single precision
            assert not single or one[name].max() > 0
            expected = one[name][-len(two[name]) :]
            close = {"rtol": max(rtol, 1e-6) if single else rtol, "atol": max(atol, 1e-8) if single else atol}
            torch.testing.assert_close(
                two[name], expected, **close, msg=lambda text, n=f"{other}: {name}": f"{n}: {text}"
            )


def test_failure_of_one_process_ends_the_other_at_once_with_its_message(tmp_path: Path) -> None:
    done = in_two_processes("-m", "tests.training.group_worker", "fail", str(tmp_path))
    assert done.returncode != 0
    assert done.stderr.count("error: mask 7 is broken.") == 1
    assert "bug in rsseg" not in done.stderr
    assert (tmp_path / "told").read_text() == "mask 7 is broken."
    failed_at = float((tmp_path / "failed").read_text())
    assert (tmp_path / "told").stat().st_mtime - failed_at < HANGING_S


def test_signal_to_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    done = in_two_processes("-m", "tests.training.group_worker", "signal", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    sent = float((tmp_path / "sent").read_text())
    ends = [(tmp_path / f"end-{rank}").read_text().split() for rank in (0, 1)]
    assert {(step, reason) for step, reason, _ in ends} == {(ends[0][0], "SIGTERM")}
    assert int(ends[0][0]) % 20, "not only where ranks report"
    assert all(float(at) - sent < HANGING_S for *_, at in ends)


def test_signal_to_one_process_ends_a_long_evaluation_of_all(tmp_path: Path) -> None:
    done = in_two_processes("-m", "tests.training.group_worker", "evaluate", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    sent = float((tmp_path / "sent").read_text())
    assert all(float((tmp_path / f"end-{rank}").read_text()) - sent < HANGING_S for rank in (0, 1))
