from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml

import dgnet
from dgnet._cost_tables import TABLES
from dgnet.detection import CocoDetection, CocoEvaluation, DetectionItems, Detector, collate
from dgnet.detection._config import DetectConfig
from dgnet.detection._module import DetectionModule
from dgnet.errors import UsageError
from dgnet.graph import record_connectivity
from dgnet.training._loading import EndlessOrder, TrainingOrder
from tests.helpers.boxes import box_entry, image_entry, write_set

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*/*_fpn*.yaml"))
NEEDED = {"data": "a.json", "images": "images", "val_data": "b.json"}


def test_passes_follow_one_another_and_begin_where_a_step_says():
    whole = EndlessOrder(TrainingOrder(7, 2, seed=0), steps=4)
    batches = list(islice(whole, 12))
    passes = [batches[start : start + 3] for start in range(0, 12, 3)]  # 7 images make 3 steps of 2
    for number, of_pass in enumerate(passes):
        assert {epoch for batch in of_pass for epoch, _ in batch} == {number}
        assert len({index for batch in of_pass for _, index in batch}) == 6
    for step in range(8):
        resumed = EndlessOrder(TrainingOrder(7, 2, seed=0), steps=4)
        resumed.epoch, resumed.start = divmod(step, 4)
        assert list(islice(resumed, 4)) == batches[step : step + 4]


def test_the_learning_rate_warms_up_and_falls_in_steps():
    config = DetectConfig(**NEEDED, iterations=100, evaluate_every=100, lr=0.1, lr_steps=[60, 80], warmup_iterations=10)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.peak_lr)
    module = DetectionModule.__new__(DetectionModule)
    torch.nn.Module.__init__(module)
    module.config = config
    scheduler = module.build_scheduler(optimizer, 100)
    rates = []
    for step in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step_update(step + 1)
    assert rates[0] == pytest.approx(0.1 * 0.001)
    assert rates[5] == pytest.approx(0.1 * (0.001 + 0.999 * 5 / 10))
    assert rates[10:60] == pytest.approx([0.1] * 50)
    assert rates[60:80] == pytest.approx([0.01] * 20)
    assert rates[80:] == pytest.approx([0.001] * 20)


@torch.no_grad()
def test_validation_runs_a_detector_once_for_each_batch_and_leaves_out_what_fills_up(tmp_path):
    dataset = CocoDetection(*write_set(tmp_path, [image_entry(i) for i in range(3)], [box_entry(1, 0, [0, 0, 9, 9])]))
    network = dgnet.create_model("dg_resnet18", router_bias=0.0, router_std=0.5)
    detector = Detector(network, 2, short_side=32, long_side=64, fpn_channels=8)
    forwards = []
    detector.register_forward_hook(lambda *_: forwards.append(1))
    evaluation = CocoEvaluation(dataset.annotations)
    module = DetectionModule(detector, DetectConfig(**NEEDED), {}, evaluation).eval()
    items = DetectionItems(dataset)
    module.validation_step(collate([items[0, 0], items[0, 1]]), 0)
    module.validation_step(collate([items[0, 2], items[0, -1]]), 1)  # the last one fills up
    assert len(forwards) == 2
    assert sorted(evaluation._detections) == [0, 1, 2]
    found = {name: float(value) for name, value in module.val_edges.compute().items()}
    with record_connectivity(detector) as record:
        detector([dataset[0][0], dataset[1][0]])
        detector([dataset[2][0], dataset[0][0]])
    for number, (matrix, topology) in enumerate(zip(record.adjacency, record.topology, strict=True), start=1):
        weights = matrix[:, topology.mask].mean(1)
        assert found[f"val_stage{number}_edge_weight"] == pytest.approx(float(weights[:3].mean()), rel=1e-5)
        assert float(weights[3]) != float(weights[:3].mean())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"data": ""}, "--data is needed"),
        (
            {"iterations": 10, "evaluate_every": 4, "warmup_iterations": 1},
            "--evaluate-every 4 leaves out the last of 10 iterations",
        ),
        ({"iterations": 10, "evaluate_every": 5}, "--warmup-iterations must be 0 to 10, got 1000"),
        ({"long_side": 400}, "--long-side 400 must not be less than --short-side 800"),
        ({"lr_steps": [5, 5]}, "--lr-steps must be increasing whole numbers from 1 on"),
        ({"frozen_norm": True}, "--frozen-norm would freeze random weights"),
        ({"frozen_stages": 2}, "--frozen-stages would freeze random weights"),
        ({"warmup_factor": 2.0}, "--warmup-factor must be 0 to 1"),
        ({"model_kwargs": {"num_classes": 3}}, "--model-kwargs cannot set num_classes"),
    ],
)
def test_refusals(options, expected):
    with pytest.raises(UsageError, match=expected):
        DetectConfig(**{**NEEDED, **options})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_recipes_say_what_is_frozen(path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"frozen_norm", "frozen_stages"} <= set(recipe)
    DetectConfig(**NEEDED, **recipe, weights="classifier.pth")


def test_coco_is_trained_on_the_1x_schedule():
    recipes = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in RECIPES if path.parent.name == "coco"}
    assert {recipe["model"] for recipe in recipes.values()} == {row.model for row in TABLES["2"].rows if "dg_" in row.model}
    for recipe in recipes.values():
        schedule = [recipe[name] for name in ("iterations", "batch_size", "lr", "lr_steps", "short_side", "long_side")]
        assert schedule == [90_000, 16, 0.02, [60_000, 80_000], 800, 1333]
