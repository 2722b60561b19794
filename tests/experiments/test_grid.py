"""Grids: which runs they ask for, and what is wrong with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dgnet.errors import UsageError
from dgnet.experiments import Grid, Places, collect, missing_runs, read_grid
from dgnet.experiments._figures import read_curves
from dgnet.files import write_table
from dgnet.training import TrainConfig
from tests.helpers.command import ask, refuse
from tests.helpers.grids import CHAIN, ONE_TRAINING, one_group, write_grid, write_yaml
from tests.helpers.networks import build_meta

ROOT = Path(__file__).parents[2]
ARM = {"model": "resnet20"}


def test_another_recipe_is_another_run(folder):
    before = read_grid(folder / "grid.yaml")
    rows = [{"digest": run.digest, "arm": run.arm, "seed": run.seed} for run in before.runs]
    write_table(before.table, rows[:3])
    assert [(run.arm, run.seed) for run in missing_runs(before)] == [("dynamic", 4)]
    for change in ({"options": {"epochs": 3}}, {"data": "train-{000000..000001}.tar"}, {"test": "other.tar"}):
        assert len(missing_runs(read_grid(write_grid(folder, **change)))) == 4


def test_where_data_and_code_lie_makes_no_other_run(folder):
    run = read_grid(folder / "grid.yaml").runs[0]
    moved = replace(run, options={**run.options, "data": "elsewhere", "threads": 1, "imports": "my_package"})
    assert moved.digest == run.digest
    assert replace(run, options={**run.options, "lr": 0.1}).digest != run.digest


def test_the_digests_of_finished_runs_stay():
    """They are in the tables that were committed: another digest would run everything again."""
    found = {(run.arm, run.seed): run.digest for run in read_grid(ROOT / "experiments" / "cifar10.yaml").runs}
    assert found["resnet20", 10] == "2684d0f9e671"
    assert found["DG-Net, starting at ER's graphs", 12] == "63cfff8ac48e"
    grid = read_grid(ROOT / "experiments" / "convert.yaml")
    run = grid.find("routed, budget 0.65, distilled", 10)
    assert (run.digest, run.unlinked.digest) == ("827e118ec979", "fd1a7acb0694")
    assert grid.read_finished()[run.arm, run.digest]["top1"] == "84.81"


def test_a_run_that_begins_with_another_one_changes_with_it(folder):
    """With the other run's training, through all runs between; not with its name or with how it is evaluated."""

    def digests(arms: dict[str, dict[str, object]]) -> list[str]:
        return [run.digest for run in read_grid(write_grid(folder, **one_group(arms))).runs]

    before = digests(CHAIN)
    assert not {*before} & {*digests({**CHAIN, "base": {**ARM, "epochs": 3}})}
    base, *later = digests({**CHAIN, "tuned": {**CHAIN["tuned"], "epochs": 3}})
    assert base == before[0]
    assert not {*later} & {*before}
    assert digests({**CHAIN, "base": {**ARM, "evaluate": {"batch_size": 2}}})[1:] == before[1:]
    assert digests({"first": ARM, "second": {**ARM, "weights": "$run:first"}}) == before[:2]
    assert digests({"base": ARM, "tuned": {**ARM, "teacher": "$run:base"}})[1] != before[1]


def test_rows_of_older_versions_count_while_what_they_began_with_stays(folder):
    """Their digest does not change with the options of the arm that a run begins with."""
    grid = read_grid(write_grid(folder, **one_group(CHAIN)))
    rows = [{"arm": run.arm, "seed": 3, "digest": run.unlinked.digest, "epochs": 2, "top1": 50} for run in grid.runs]
    assert [row["digest"] for row in rows] != [run.digest for run in grid.runs]
    write_table(grid.table, rows)
    write_table(grid.curves, [{**row, "epoch": 1, "train_loss": 2.5} for row in rows])
    assert missing_runs(grid) == []
    assert list(collect(grid)) == list(CHAIN)
    assert read_curves(grid, collect(grid))["student"] == {1: [2.5]}

    changed = read_grid(write_grid(folder, **one_group({**CHAIN, "base": {**ARM, "epochs": 3}})))
    assert [run.unlinked.digest for run in changed.runs[1:]] == [row["digest"] for row in rows[1:]]
    assert missing_runs(changed) == changed.runs
    write_table(grid.table, [*rows, {**rows[0], "digest": changed.runs[0].digest}])
    assert missing_runs(changed) == changed.runs[1:]  # the others began with what was run before


def test_run_folders_of_older_versions_are_kept_if_they_began_with_the_same(folder):
    places = Places(folder / "runs", folder / "data")

    def find(grid: Grid) -> list[str]:
        return [places.folder(run).name for run in grid.runs]

    grid = read_grid(write_grid(folder, **one_group(CHAIN)))
    assert find(grid) == [run.name for run in grid.runs]
    for run in grid.runs:
        (folder / "runs" / run.unlinked.name).mkdir(parents=True)
        needed = {name: f"elsewhere/{one.unlinked.name}" for name, one in run.begins.items()}  # where it was trained
        write_yaml(folder / "runs" / run.unlinked.name / "config.yaml", {**run.options, **needed})
    assert find(grid) == [run.unlinked.name for run in grid.runs] != [run.name for run in grid.runs]
    assert places.options(grid, grid.runs[2])["teacher"] == str(folder / "runs" / grid.runs[1].unlinked.name)
    changed = read_grid(write_grid(folder, "changed.yaml", **one_group({**CHAIN, "base": {**ARM, "epochs": 3}})))
    assert [run.unlinked.name for run in changed.runs[1:]] == find(grid)[1:]
    assert find(changed) == [run.name for run in changed.runs]
    (folder / "runs" / grid.runs[1].name).mkdir()
    assert find(grid)[1] == grid.runs[1].name


def test_arms_that_differ_in_their_evaluation_share_a_training(folder):
    usual, raw = read_grid(write_grid(folder, **one_group(ONE_TRAINING))).runs
    assert usual.name == raw.name
    assert usual.digest != raw.digest
    assert usual.options == raw.options


def test_a_seed_stands_for_the_runs_own(folder):
    arm = {"model": "randwire_small_er", "model_kwargs": {"topology_seed": "$seed", "channels": 8}}
    grid = read_grid(write_grid(folder, **one_group({"er": arm}, (3, 4))))
    assert [run.options["model_kwargs"]["topology_seed"] for run in grid.runs] == [3, 4]


def test_a_grid_like_another_has_its_groups_and_its_own_images(folder):
    (folder / "more").mkdir()
    path = write_yaml(folder / "more" / "other.yaml", {"like": "../grid.yaml", "data": "photos", "options": {"epochs": 4}})
    other, base = read_grid(path), read_grid(folder / "grid.yaml")
    assert [(run.group, run.arm, run.seed) for run in other.runs] == [(run.group, run.arm, run.seed) for run in base.runs]
    assert other.compare == base.compare
    assert (other.data, other.test) == ("photos", "test.tar")
    assert other.table == folder / "more" / "results" / "other.csv"
    options = {name: other.runs[0].options[name] for name in ("epochs", "evaluate_every", "batch_size")}
    assert options == {"epochs": 4, "evaluate_every": 2, "batch_size": 4}  # its own, the other grid's, the recipe's


def test_finished_runs_of_another_grid_count(folder, capsys):
    """Runs of the same options and images, under whatever name; the grid's own rows come first."""
    arms = {"my baseline": {"model": "resnet20"}}
    other = read_grid(write_grid(folder, "other.yaml", **one_group(arms, (3, 4))))
    rows = [{"arm": run.arm, "seed": run.seed, "digest": run.digest, "epochs": 2, "top1": 10 * run.seed} for run in other.runs]
    write_table(other.table, rows)
    write_table(other.curves, [{**row, "epoch": epoch, "train_loss": epoch} for row in rows for epoch in (1, 2)])
    (folder / "more").mkdir()
    path = write_grid(folder / "more", recipe="../recipe.yaml", reuse=["../other.yaml"])
    grid = read_grid(path)
    assert [(run.arm, run.seed) for run in missing_runs(grid)] == [("dynamic", 3), ("dynamic", 4)]
    assert {seed: row["top1"] for seed, row in collect(grid)["static"].items()} == {3: "30", 4: "40"}
    assert read_curves(grid, collect(grid)) == {"static": {1: [1.0, 1.0], 2: [2.0, 2.0]}}
    assert "static" in ask(capsys, "experiment", "report", str(path))
    write_table(grid.table, [{**rows[0], "arm": "static", "top1": 50}])
    assert {seed: row["top1"] for seed, row in collect(grid)["static"].items()} == {3: "50", 4: "40"}
    assert len(missing_runs(read_grid(write_grid(folder / "more", recipe="../recipe.yaml")))) == 3


def test_runs_that_begin_with_a_result_need_its_folder(folder):
    """A run is run again if its folder is not there; one that begins with another result is reused if that is the same."""
    arms = {"static": {"model": "resnet20"}, "student": {"model": "dg_resnet20", "teacher": "$run:static"}}
    grid = read_grid(write_grid(folder, **one_group(arms)))
    write_table(grid.table, [{"arm": run.arm, "seed": run.seed, "digest": run.digest} for run in grid.runs[:1]])
    assert [run.arm for run in missing_runs(grid)] == ["student"]
    assert [run.arm for run in missing_runs(grid, is_there=lambda run: False)] == ["static", "student"]
    write_table(grid.table, [{"arm": run.arm, "seed": run.seed, "digest": run.digest} for run in grid.runs])
    assert missing_runs(grid, is_there=lambda run: False) == []
    assert missing_runs(read_grid(write_grid(folder, "again.yaml", **one_group(arms), reuse=["grid.yaml"]))) == []
    changed = one_group({**arms, "static": {"model": "resnet20", "epochs": 1}})
    again = read_grid(write_grid(folder, "again.yaml", **changed, reuse=["grid.yaml"]))
    assert [run.arm for run in missing_runs(again)] == ["static", "student"]


def test_what_was_begun_but_is_not_finished_is_run_before_what_begins_with_it(folder):
    groups = {arm: {"seeds": [3], "arms": {arm: options}} for arm, options in CHAIN.items()}
    grid = read_grid(write_grid(folder, groups=groups, compare=[]))
    assert [run.arm for run in missing_runs(grid, ["student"], is_there=lambda run: True)] == ["base", "tuned", "student"]


def test_runs_come_after_those_that_they_begin_with(folder):
    """Otherwise in the order of the file."""
    arms = {"first": ARM, "student": CHAIN["student"], "other": ARM, "base": ARM, "tuned": CHAIN["tuned"]}
    grid = read_grid(write_grid(folder, **one_group(arms, (3, 4))))
    order = ["first", "base", "tuned", "student", "other"]
    assert [(run.arm, run.seed) for run in grid.runs] == [(arm, seed) for seed in (3, 4) for arm in order]
    assert {run.seed for one in grid.runs[5:] for run in one.begins.values()} == {4}
    assert missing_runs(grid) == grid.runs


@pytest.mark.parametrize(
    ("reuse", "line"),
    [
        (["absent.yaml"], "absent.yaml cannot be read"),
        (["recipe.yaml"], "recipe.yaml: unknown key 'batch_size'"),
        (["grid.yaml"], "reuse names the grid itself"),
        ("other.yaml", "reuse must be"),
    ],
)
def test_mistakes_in_what_is_reused(folder, reuse, line):
    with pytest.raises(UsageError, match=line):
        read_grid(write_grid(folder, reuse=reuse))


@pytest.mark.parametrize(
    ("data", "test", "expected"),
    [
        ("train-{0..1}.tar", "a/test.tar", ("DATA/train-{0..1}.tar", "DATA/a/test.tar")),
        ("photos", None, ("DATA/photos", None)),
        ("/else/photos", "photos/test", ("/else/photos", "DATA/photos/test")),
        ("wds/train-0.tar", "a.tar::b.tar", ("wds/DATA/train-0.tar", "DATA/a.tar::DATA/b.tar")),
        ("digits", None, ("digits", None)),
        ("torch/cifar10", None, ("torch/cifar10", None)),
        ("hfds/user/name", "hfds/user/name:test", ("hfds/user/name", "hfds/user/name:test")),
        ("https://example.org/{0..9}.tar", "photos", ("https://example.org/{0..9}.tar", "DATA/photos")),
    ],
)
def test_a_grid_takes_every_kind_of_source(data, test, expected, folder):
    options = {"holdout": 0} if test is not None or ".tar" not in data else {"holdout": 4}
    grid = read_grid(write_grid(folder, data=data, test=test, options=options))
    found = Places(folder / "runs", Path("DATA")).options(grid, grid.runs[0])
    assert (found["data"], found["val_data"]) == expected
    is_named = data.startswith(("torch/", "hfds/"))
    assert found.get("data_root") == ("DATA" if is_named else None)
    if data == "digits":
        assert Places(folder / "runs").options(grid, grid.runs[0])["data"] == "digits"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "absent.yaml"}, "absent.yaml cannot be read: No such file"),
        ({"recipe": ...}, "lacks recipe"),
        ({"groups": None}, "groups must be a dict, got null"),
        ({"groups": {}}, "groups holds no arm"),
        ({"group": {}}, "unknown key 'group'; did you mean 'groups'? keys: like, recipe, data"),
        ({"groups": {"a": {"seeds": [1]}}}, "group 'a' lacks arms"),
        ({"groups": {"a": {"seeds": [1], "arms": {}, "seed": 3}}}, "group 'a': unknown key 'seed'; did you mean 'seeds'?"),
        ({"image_size": 8}, "unknown key 'image_size'; keys: like, recipe, data, test, options, groups, compare, reuse"),
        ({"test": ...}, "arm 'static' needs either `test` in the grid or `holdout` among its options, not both"),
        ({"options": {"holdout": 4}}, "arm 'static' needs either `test` in the grid or `holdout`"),
        ({"options": {"epoch": 4}}, "options: unknown option 'epoch'; did you mean 'epochs'?"),
        ({"options": {"node_gate": "hard"}}, "unknown option 'node_gate'; options of a network are entries of model_kwargs"),
        ({"options": {"data": "x"}}, "options cannot set data: `data` says it"),
        ({"compare": [["static", "fixed"]]}, "compare has 'fixed', which is not an arm; arms: dynamic, static"),
        ({"compare": [["static", "dynamc"]]}, "'dynamc', which is not an arm; did you mean 'dynamic'?"),
        ({"compare": [["static"]]}, "compare[0] must be a list of 2 texts, got ['static']"),
        (
            {"groups": {g: {"seeds": [3], "arms": {"static": ARM}} for g in "ab"}, "compare": []},
            "arm 'static' with seed 3 is in two groups: a, b",
        ),
        (
            {"groups": {g: {"seeds": [s], "arms": {"x": {"lr": s}}} for g, s in (("a", 3), ("b", 4))}, "compare": []},
            "two arms are called 'x', in the groups 'a' and 'b'; rename one",
        ),
        (one_group({"x": {**ARM, "lrr": 1}}), "arm 'x': unknown option 'lrr'; did you mean 'lr'?"),
        (one_group({"x": {**ARM, "seed": 1}}), "arm 'x' cannot set seed: `seeds` of a group says it"),
        (one_group({"x": 5}), "arm 'x' must be a dict, got 5"),
        (one_group({20: ARM}), "names must be text, got 20"),
        (one_group({"x": {**ARM, "weights": "$run:y"}}), "has no arm 'y' with seed 3, which another arm names"),
        (one_group({"x": {**ARM, "weights": "$run:x"}}), "an arm begins with its own result: 'x' → 'x'; change one of"),
        (
            one_group({"a": ARM, **{x: {**ARM, "teacher": f"$run:{y}"} for x, y in ("zx", "xy", "yx")}}),
            "an arm begins with its own result: 'x' → 'y' → 'x'; change one of these $run:",
        ),
        (one_group({"x": ARM}, ["a"]), "seeds[0] must be a whole number, got 'a'"),
        (one_group({"x": ARM}, [1.5]), "seeds[0] must be a whole number, got 1.5"),
        (one_group({"x": ARM}, [True]), "seeds[0] must be a whole number, got true"),
        (one_group({"x": ARM}, [3, 4, 3]), "seed 3 is given twice; remove one"),
        (one_group({"x": ARM}, [-1]), "a seed must be 0 to 4294967295, got -1"),
        (one_group({"x": ARM}, []), "seeds lists none"),
        ({"like": "grid.yaml"}, "like leads back to"),
        ({"like": "absent.yaml"}, "absent.yaml cannot be read"),
    ],
    ids=str,
)
def test_a_mistake_in_a_grid_ends_in_one_line(folder, changes, message, capsys):
    path = write_grid(folder, **changes)
    for words in (("run", path, "--data", folder / "data"), ("report", path)):
        line = refuse(capsys, "experiment", *words)
        assert message in line
        assert str(folder) in line
    assert not (folder / "results").exists()


def test_a_name_that_is_given_twice_is_refused(folder, capsys):
    text = (folder / "grid.yaml").read_text()
    (folder / "grid.yaml").write_text(text.replace("dynamic:\n", "static:\n"))
    assert "'static' is given twice; remove one" in refuse(capsys, "experiment", "report", folder / "grid.yaml")


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"epochs": 0}, "arm 'x': --epochs must be at least 1, got 0"),
        ({"epochs": "many"}, "arm 'x': --epochs must be a whole number, got 'many'"),
        ({"weighting": "nowhere.W"}, "arm 'x': weighting is code of the package nowhere (nowhere.W), which is run only if"),
        ({"weights": "nowhere.ckpt", "evaluate": {"mod": "x"}}, "evaluate: unknown option 'mod'; did you mean '--mode'?"),
        ({"evaluate": {"batch_size": 0}}, "evaluate: --batch-size must be at least 1, got 0"),
    ],
    ids=str,
)
def test_a_mistake_in_an_arm_is_found_before_anything_runs(folder, arm, message, capsys):
    path = write_grid(folder, **one_group({"x": {**ARM, **arm}}))
    for further in ([], ["--dry-run"]):
        words = ["run", path, "--data", folder / "data", "--output", folder / "runs", *further]
        assert message in refuse(capsys, "experiment", *words)
    assert not (folder / "runs").exists()


def test_code_that_a_grid_names_needs_a_typed_import(folder, capsys):
    path = write_grid(folder, **one_group({"x": {"model": "dg_resnet20", "weighting": "nowhere_at_all.W"}}))
    line = refuse(capsys, "experiment", "run", path, "--dry-run")
    assert "which is run only if you trust it: --import nowhere_at_all" in line
    line = refuse(capsys, "experiment", "run", path, "--dry-run", "--import", "nowhere_at_all")
    assert "nowhere_at_all cannot be imported: there is no such module" in line


def test_mistakes_of_the_command_end_in_one_line(folder, capsys):
    for arguments, message in [
        ((folder / "absent.yaml", "--data", folder / "data"), "absent.yaml cannot be read"),
        ((folder / "grid.yaml", "--data", folder / "nowhere"), "train-000000.tar does not exist"),
        ((folder / "grid.yaml",), "is a relative path; name the folder that holds it with --data"),
        ((folder / "grid.yaml", "--data", folder / "data", "--groups", "b"), "unknown group 'b'; groups of"),
        ((folder / "grid.yaml", "--data", folder / "data", "--jobs", 0), "--jobs must be at least 1, got 0"),
    ]:
        assert message in refuse(capsys, "experiment", "run", *arguments)
    assert "holds no finished run of" in refuse(capsys, "experiment", "report", folder / "grid.yaml")
    assert "unknown --formats 'gif'" in refuse(capsys, "experiment", "report", folder / "grid.yaml", "--formats", "gif")
    write_grid(folder, data="photos", test=...)
    line = refuse(capsys, "experiment", "run", folder / "grid.yaml", "--data", folder / "data")
    assert f"data source '{folder}/data/photos' does not exist" in line


def test_the_missing_runs_are_listed_without_the_data(folder, capsys):
    listed = ask(capsys, "experiment", "run", folder / "grid.yaml", "--dry-run")
    assert listed.splitlines()[0] == "a: static, seed 3"


@pytest.mark.slow
def test_every_arm_of_the_grids_in_the_repository_is_a_network_that_can_be_built():
    networks: dict[str, TrainConfig] = {}  # an arm's seeds train one network
    for path in (ROOT / "experiments").glob("*.yaml"):
        for run in read_grid(path).runs:
            config = TrainConfig(**{**run.options, "val_data": None})
            networks[repr((config.model, config.network_kwargs))] = config
            json.dumps(run.options)
    for config in networks.values():
        build_meta(config.model, **config.network_kwargs)


def test_a_missing_arm_is_an_error_of_the_library_too(folder):
    with pytest.raises(UsageError, match="has no arm 'x' with seed 3"):
        read_grid(folder / "grid.yaml").find("x", 3)
