from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from dgnet import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    print("none"); sys.exit()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does")
def test_kept_memory_is_not_faulted_in_again():
    kept, given_back = (
        subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True).stdout.strip()
        for mode in ("keep", "system")
    )
    if kept == "none":
        pytest.skip("the C library has no mallopt")
    assert int(kept) < 100 < int(given_back)
