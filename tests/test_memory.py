from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from dgnet import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
if keep_freed_memory():
    # Until the heap holds a block of this size. Where the address space of a process begins decides after how many rounds.
    print(min(faults() for _ in range(8)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_kept_memory_is_not_faulted_in_again():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    given_back, *kept = map(int, done.stdout.split())
    if not kept:
        pytest.skip("the C library has no mallopt")
    assert kept[0] < 100 < given_back
