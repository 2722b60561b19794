"""The recipes, and options beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from dgnet._cost_tables import TABLES
from dgnet.checkpoint import load_checkpoint
from tests.helpers.command import ask, refuse
from tests.helpers.data import write_folder

ALL = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(recipe for task in ("cifar10", "imagenet") for recipe in (ALL / task).glob("*.yaml"))


def test_every_dynamic_network_of_the_papers_tables_has_a_recipe():
    dynamic = {name: [row.model for row in TABLES[name].rows if row.model.startswith("dg_")] for name in ("1", "4", "5")}
    expected = {
        # model: rate, decay (§4.1, §6.1), by the epochs of its table
        **{(model, 100): (0.4, 1e-4) for model in dynamic["1"] if "resne" in model},
        **{(model, 100): (0.8, 5e-5) for model in dynamic["1"] if "regnet" in model},
        **{(model, 250): (0.8, 5e-5) for model in dynamic["5"]},
        **{(model, 100): (0.4, 5e-5) for model in dynamic["4"]},
        ("dg_mobilenetv2_100", 200): (0.4, 4e-5),
    }
    recipes = [yaml.safe_load(recipe.read_text(encoding="utf-8")) for recipe in RECIPES if recipe.parent.name == "imagenet"]
    recipes = [recipe for recipe in recipes if recipe["model"].startswith("dg_")]
    assert {(r["model"], r["epochs"]): (r["lr"], r["weight_decay"]) for r in recipes} == expected
    assert {name for name, *_ in expected} == {model for models in dynamic.values() for model in models}
    for recipe in recipes:
        common = (recipe["batch_size"], recipe["warmup_epochs"], recipe["momentum"], recipe["label_smoothing"])
        assert common == (1024, 5, 0.9, 0.1)
        assert recipe.get("model_kwargs") == ({"drop_rate": 0.2} if "mobilenet" in recipe["model"] else None)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.parent.name}-{recipe.stem}")
def test_a_recipe_takes_a_step_on_a_tiny_fake_imagenet(recipe, tmp_path, capsys):
    write_folder(tmp_path / "data", {"ant": 2, "cat": 2})
    data = ["--data", tmp_path / "data", "--val-data", tmp_path / "data"]
    small = ["--image-size", 64, "--batch-size", 4, "--epochs", 1, "--warmup-epochs", 0]
    if "search_epochs" in recipe.read_text(encoding="utf-8"):
        small += ["--search-epochs", 0, "--tune-epochs", 0, "--latency-target", 10]  # whatever this processor's latencies are
    options = [*data, *small, "--compile", "false", "--precision", 32, "--output", tmp_path / "run"]
    ask(capsys, "train", "--config", recipe, *options, "--weights", "null")  # a recipe for fine-tuning names a file
    trained = load_checkpoint(tmp_path / "run")
    assert trained.model == yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]
    assert all(tensor.isfinite().all() for tensor in trained.state_dict.values())
    trained.build_network()
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1


def test_a_recipes_switches(tmp_path, capsys):
    """The static baseline, Table 6's α, Fig. 4's bias: options beside a recipe, whose own model options stay."""
    write_folder(tmp_path / "data", {"ant": 2, "cat": 2})
    recipe = next(recipe for recipe in RECIPES if "mobilenetv2" in recipe.name)
    data = ["--data", tmp_path / "data", "--val-data", tmp_path / "data"]
    small = ["--image-size", 32, "--batch-size", 4, "--epochs", 1, "--warmup-epochs", 0]
    for number, (switches, expected) in enumerate(
        (
            (["--model", "mobilenetv2_100"], {"drop_rate": 0.2}),
            (["--weighting", "learned"], {"drop_rate": 0.2, "learned_start": 1.0}),
            (["--model-kwargs.router_bias", 0], {"drop_rate": 0.2, "router_bias": 0}),
        )
    ):
        ask(capsys, "train", "--config", recipe, *data, *small, *switches, "--output", tmp_path / str(number))
        kwargs = load_checkpoint(tmp_path / str(number)).model_kwargs
        assert {name: kwargs[name] for name in expected} == expected


def test_a_recipe_with_a_misspelt_option(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text("epochz: 3\n")
    assert "epochz" in refuse(capsys, "train", "--config", tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("{epochs: [\n")
    assert f"--config {tmp_path}/r.yaml is not valid YAML" in refuse(capsys, "train", "--config", tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("lr: .inf\n")
    assert "--lr must be a finite number, got inf" in refuse(capsys, "train", "--config", tmp_path / "r.yaml")
