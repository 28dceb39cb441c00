import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.ddp_worker import main


@pytest.mark.parametrize(("case", "rtol", "atol"), [("toy", 1e-10, 1e-12), ("dasegnet", 1e-4, 1e-6)])
def test_two_processes_with_accumulation_equal_one_process(case: str, rtol: float, atol: float, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = ["-m", "tests.training.ddp_worker", str(tmp_path), "2", case]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *worker], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    main(tmp_path, 4, case)
    one, two = load_file(tmp_path / "1.safetensors"), load_file(tmp_path / "2.safetensors")
    assert one.keys() == two.keys()
    # running statistics follow the images that each process sees; they are the main process's
    compared = [name for name in one if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert sum(name.startswith("loss.") for name in compared) == (2 if case == "toy" else 6)
    for name in compared:
        single = name.startswith("loss.")  # logged in single precision
        assert not single or one[name].max() > 0
        close = {"rtol": max(rtol, 1e-6) if single else rtol, "atol": max(atol, 1e-8) if single else atol}
        torch.testing.assert_close(two[name], one[name], **close, msg=lambda text, n=name: f"{n}: {text}")
