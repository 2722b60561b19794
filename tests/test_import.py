from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import dgnet

USERS_NEED = (
    *("create_model", "list_models", "load_static_weights", "Connectivity", "DynamicGraph", "Topology", "Weighting"),
    *(
        "record_connectivity",
        "use_connectivity",
        "convert",
        "to_static",
        "describe",
        "Description",
        "set_mode",
        "set_sparse",
        "set_threshold_offset",
        "compile_network",
        "fold_batch_norms",
    ),
    *(
        "export_network",
        "cost",
        "Cost",
        "load_checkpoint",
        "train",
        "TrainConfig",
        "evaluate",
        "Evaluation",
        "plot_adjacency",
        "plot_graph",
    ),
    *("publish", "Publication", "keep_freed_memory", "compile_options", "UsageError", "__version__"),
)


def run_python(code: str) -> str:
    """What a new process prints that runs `code`; it must succeed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_lists_what_users_need() -> None:
    assert sorted(dgnet.__all__) == sorted(USERS_NEED)
    assert set(dgnet.__all__) <= set(dir(dgnet))


@pytest.mark.parametrize("name", ["dgnet", "dgnet.analysis", "dgnet.detection", "dgnet.training"])
def test_every_public_name_resolves(name: str) -> None:
    package = importlib.import_module(name)
    for public in package.__all__:
        assert getattr(package, public) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'dgnet' has no attribute 'creat_model'"):
        dgnet.creat_model  # noqa: B018


def test_importing_dgnet_imports_nothing_that_is_slow() -> None:
    assert (
        run_python("import dgnet, sys; print(sorted({'torch', 'timm', 'lightning', 'matplotlib'} & set(sys.modules)))")
        == "[]\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    ["import dgnet, importlib.util; importlib.util.find_spec('timm'); import timm", "import timm, dgnet"],
    ids=["dgnet first, timm only looked for, timm", "timm first"],
)
def test_importing_dgnet_registers_the_networks_with_timm(imports: str) -> None:
    checks = "print(timm.is_model('dg_resnet50'), sorted({'lightning', 'matplotlib'} & set(sys.modules)))"
    packages = "print([getattr(dgnet, name).__name__ for name in ('graph', 'models', 'training', 'detection', 'analysis')])"
    assert run_python(f"{imports}; import sys; {checks}; {packages}").splitlines() == [
        "True []",
        "['dgnet.graph', 'dgnet.models', 'dgnet.training', 'dgnet.detection', 'dgnet.analysis']",
    ]
