"""Exported networks in other people's runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dgnet
from dgnet.checkpoint import Checkpoint
from dgnet.cli import main
from dgnet.data import Preprocessing
from dgnet.inference import save_export
from tests.helpers.pages import blocks, find_commands
from tests.helpers.tools import PAGE, require, run_page

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the tools


def is_mixed(network, images) -> bool:
    """Whether the images take different paths, and skip blocks."""
    with torch.no_grad(), dgnet.record_connectivity(network) as record:
        network(images)
    return any(0 < share < 1 for stage in record.ran for share in stage.float().mean(0).tolist())


def test_onnx_runtime(routed):
    preprocessing = Preprocessing.of(routed.pretrained_cfg, image_size=32)
    options = {"node_gate": "hard"}
    classes = [str(number) for number in range(10)]
    Checkpoint(Path("RUN"), routed.state_dict(), "dg_resnet20", options, classes, {}, preprocessing).save(Path("RUN"))
    (block,) = blocks(PAGE, "sh", "ONNX Runtime")
    (words,) = find_commands(block)
    assert main(words) == 0
    scope = run_page("ONNX Runtime")
    assert is_mixed(routed, scope["images"])
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(scope["logits"]), routed(scope["images"]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_openvino(routed, mode):
    openvino = require("openvino")
    path = Path("dg_resnet20-dense.onnx")  # the name on the page, for both forms
    save_export(dgnet.export_network(routed, 32, mode), path, "onnx", {})
    scope = run_page("OpenVINO", model=routed)
    images = torch.randn(16, 3, 32, 32)
    assert is_mixed(routed, images)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    for run in (scope["run"], openvino.compile_model(scope["converted"], "CPU", exact)):
        for batch in (16, 1, 3):  # several, because OpenVINO computed others for several images
            with torch.no_grad():
                expected = routed(images[:batch])
            torch.testing.assert_close(torch.from_numpy(run(images[:batch].numpy())[0]), expected, atol=1e-4, rtol=1e-4)
