"""Speed and memory of two networks, measured in one process and given as ratios."""

from typing import TYPE_CHECKING

from dgnet._lazy import lazy_names

if TYPE_CHECKING:
    from dgnet.bench._bench import bench as bench
    from dgnet.bench._config import BenchConfig as BenchConfig
    from dgnet.bench._machine import describe_hardware as describe_hardware
    from dgnet.bench._machine import versions as versions
    from dgnet.bench._result import BenchResult as BenchResult
    from dgnet.bench._result import Measured as Measured
    from dgnet.bench._result import format_bench as format_bench
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
