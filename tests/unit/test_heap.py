"""Memory that the heap keeps; in processes of their own, because it is for the whole process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = """
import torch
from rsseg.inference.machine import HeapGuard, keep_heap, resident_bytes

keep_heap()
blocks, pins = [], []
for _ in range(40):
    blocks.append(torch.ones(1 << 20))
    pins.append(torch.ones(1 << 10))
full = resident_bytes()
blocks.clear()
HeapGuard(full + (1 << 30)).check()
kept = resident_bytes()
HeapGuard(0).check()
print(full - kept, kept - resident_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc and /proc")
@pytest.mark.parametrize("keep", ["1", "0"])
def test_guard_gives_back_what_the_heap_keeps_and_not_before(keep: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RSSEG_KEEP_HEAP": keep}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment)
    freed_at_once, given_back = (int(number) >> 20 for number in done.stdout.split())
    if keep == "1":
        assert freed_at_once < 20
        assert given_back > 140
    else:
        # By default glibc returns large blocks itself, and the guard does nothing.
        assert given_back == 0
