"""What an InstaNAS network needs before it is trained: its phases, and the measured latency of its modules."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dgnet.devices import choose_devices
from dgnet.errors import UsageError
from dgnet.models import InstaNAS
from dgnet.options import flag
from dgnet.paths import absolute, is_file
from dgnet.training._config import TrainConfig
from dgnet.training._latency import LatencyTable, measure_latencies, read_latencies
from dgnet.training._processes import is_main_process
from dgnet.training._run import Run
from dgnet.training._search import LatencyRange, resolve_phases

_REFUSED = {
    "freeze": "the phases say what is trained",
    "layer_decay": "the controller is no layer of the meta-graph",
}
"""Options that have no meaning here, and why."""


def prepare_search(
    network: InstaNAS, config: TrainConfig, image_size: tuple[int, int], run: Run
) -> tuple[TrainConfig, LatencyTable]:
    """Find the latency of the modules. Returns `config` with the epochs of all phases, and the table for the run folder.

    The latency is measured when a run begins. A run that continues has it in its checkpoint. Raises UsageError for options that
    do not fit together.
    """
    for name, why in _REFUSED.items():
        if getattr(config, name) is not None:
            raise UsageError(f"{flag(name)} has no meaning for {config.model}, because {why}; leave it out")
    if config.precision == "fp16":
        raise UsageError(f"--precision fp16 is not possible for {config.model}, which has two optimisers; use bf16")
    search, tune = resolve_phases(config)
    config = replace(config, search_epochs=search, tune_epochs=tune)
    table = LatencyTable(run.folder, {"about": "from the checkpoint of the run"})
    if run.step is not None:  # the checkpoint has the latencies
        return config, table
    if config.latency_table is not None or (run.resume and is_file(table.path)):  # it ended before its first checkpoint
        path = table.path if config.latency_table is None else Path(absolute(config.latency_table))
        network.latency.copy_(read_latencies(path, len(network.cells)))
        how = f"from {path}"
    elif not is_main_process(config.nodes):  # DDP gives all processes the latencies of the first one
        return config, table
    else:
        device = "cpu" if config.latency_device == "cpu" else _find_device(config)
        network.latency.copy_(measure_latencies(network, image_size, device))
        how = f"measured on {device} with {torch.get_num_threads()} threads"
    found = LatencyRange.of(network)
    found.check(config.latency_target)
    run.say(
        f"latency of the modules for one image, {how}: all {found.total:.3g} ms, MobileNetV2's {found.reference:.3g} ms,"
        f" what always runs {found.least:.3g} ms"
    )
    run.say(f"phases: {config.epochs - search - tune} epochs of the meta-graph, {search} of the search, {tune} of fine-tuning")
    return config, LatencyTable(run.folder, {"about": how, "image_size": list(image_size), "batch_size": 1})


def _find_device(config: TrainConfig) -> str:
    """The kind of device that the run trains on."""
    kind, _ = choose_devices(config.accelerator, config.devices)
    return "cuda" if kind in ("gpu", "cuda") and torch.cuda.is_available() else kind
