"""Private names of other libraries: each still does what `dgnet.compat` needs, and nothing else touches one."""

import argparse
import ast
import io
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import lightning as L
import pytest
import timm
import torch
import torch.utils.checkpoint
from jsonargparse import ArgumentParser
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import dgnet
from dgnet.cli.command import Parser
from dgnet.compat.argparse import option_strings
from dgnet.compat.timm import EfficientSqueezeExcite, FeatureGetterNet
from dgnet.compat.torch import (
    DYNAMO_READS_CONTEXT_VARS,
    UNCOUNTED,
    count_writes,
    current_backward,
    find_batch_norm,
    find_leaves,
    find_tensors,
    has_forward_hooks,
    is_compiled_for_all_sizes,
    is_in_backward,
    is_transformed,
    will_run,
)
from dgnet.errors import BadImageError, UsageError

SOURCE = Path(dgnet.__file__).parent


def moved(library: str, name: str) -> str:
    file = library.lower()
    return f"{library} has moved or changed {name}: see dgnet/compat/{file}.py"


def test_matrix_products_that_torch_does_not_count():
    x = torch.ones(1, 2, 5, 4)
    layer, recurrent = nn.Bilinear(3, 4, 5), nn.LSTM(4, 3, batch_first=True)
    counted = []
    for run in (
        lambda: torch.nn.functional.scaled_dot_product_attention(x, x, x),
        lambda: layer(torch.ones(2, 3), torch.ones(2, 4)),
        lambda: recurrent(x[0]),
    ):
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            run()
        counted.append(counter.get_total_flops() // 2)
    assert counted == [2 * 2 * 5 * 5 * 4, 2 * 3 * 4 * 5, 2 * 5 * 4 * 3 * (4 + 3)], moved("torch", "operators of UNCOUNTED")


def test_a_backward_pass_is_noticed():
    seen = []

    def forward(x):
        seen.append(is_in_backward())
        return x * x

    y = torch.utils.checkpoint.checkpoint(forward, torch.ones(1, requires_grad=True), use_reentrant=False)
    y.backward()
    assert seen == [False, True], moved("torch", "_C._current_graph_task_id")
    assert not is_in_backward()


def test_the_batch_normalisation_of_an_output_is_found():
    norm = nn.BatchNorm2d(3)
    read = torch.randn(4, 3, 2, 2, requires_grad=True) * 2
    for mode in (True, False):
        output = norm.train(mode)(read)
        found = find_batch_norm(output)
        assert found is not None, moved("torch", "names of batch normalisations in autograd's graph, or what they keep")
        again = found.scale.view(3, 1, 1) * found.input + found.shift.view(3, 1, 1)
        torch.testing.assert_close(again, output, rtol=1e-5, atol=1e-6, msg=moved("torch", "what batch normalisations keep"))
    assert find_batch_norm(output.relu()) is None
    assert find_batch_norm(output.detach()) is None


def test_what_a_backward_pass_will_run_is_known():
    x, y = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    first, second = x * 2, y * 3
    seen = []
    total = first * second
    total.register_hook(lambda grad: seen.append([current_backward(), *map(will_run, (first.grad_fn, second.grad_fn))]))
    torch.autograd.grad(total, x, retain_graph=True)
    total.backward()
    assert [row[1:] for row in seen] == [[True, False], [True, True]], moved("torch", "_C._will_engine_execute_node")
    assert -1 not in {seen[0][0], seen[1][0]}
    assert seen[0][0] != seen[1][0], moved("torch", "_C._current_graph_task_id")
    assert current_backward() == -1


def test_transforms_are_noticed():
    seen = {}

    def note(name):
        def run(x):
            seen[name] = is_transformed(x)
            return x * 2

        return run

    one = torch.ones(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated
        torch.jit.trace(note("trace"), one, check_trace=False)
    torch.func.vmap(note("vmap"))(one)
    torch.func.grad(lambda x: note("grad")(x).sum())(one)
    make_fx(note("make_fx"))(one)
    with forward_ad.dual_level():
        note("dual")(torch.ones(1))
    with FakeTensorMode() as mode:
        note("fake")(mode.from_tensor(one))
    assert all(seen.values()), moved("torch", f"what is_transformed reads: {seen}")
    assert len(seen) == 6
    note("plain")(one)
    with torch.inference_mode(), torch.autocast("cpu"):
        note("modes")(one)
    assert not seen["plain"]
    assert not seen["modes"]


@pytest.mark.parametrize(("dynamic", "expected"), [(True, True), (None, False), (False, False)])
def test_compilation_for_all_sizes_is_noticed(dynamic, expected):
    torch._dynamo.reset()

    def scale(x):
        return x * 2 if is_compiled_for_all_sizes() else x

    compiled = torch.compile(scale, backend="eager", dynamic=dynamic, fullgraph=True)
    is_noticed = compiled(torch.ones(1)).item() == 2
    torch._dynamo.reset()
    assert is_noticed == expected, moved("torch", "_dynamo.config.assume_static_by_default")


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_forward_hooks_of_a_part_are_noticed(register):
    module = nn.Sequential(nn.Sequential(nn.ReLU()))
    assert not has_forward_hooks(module)
    handle = getattr(module[0][0], register)(lambda *arguments: None)
    assert has_forward_hooks(module), moved("torch", "Module._forward_hooks or _forward_pre_hooks")
    handle.remove()
    assert not has_forward_hooks(module)


def test_dynamo_reads_context_variables_or_not():
    variable = ContextVar("variable", default=2)

    def double(x):
        return x * variable.get()

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    try:
        compiled(torch.ones(1))
        is_traced = True
    except torch._dynamo.exc.Unsupported:
        is_traced = False
    assert is_traced == DYNAMO_READS_CONTEXT_VARS, moved("torch", "_dynamo.source.ContextVarGetSource")


class Refusing(Dataset):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise self.error


@pytest.mark.parametrize("kind", [UsageError, BadImageError])
@pytest.mark.parametrize("message", ["a.jpg is no image; take it out", "two\nlines: of it", "dgnet.errors: x"])
def test_what_a_worker_says_arrives(kind, message):
    with pytest.raises(UsageError) as caught:
        list(DataLoader(Refusing(kind(message)), num_workers=1))
    assert type(caught.value) is kind
    assert str(caught.value) == message.replace("\n", " "), moved("torch", "the text of a worker's exception")


def test_only_what_a_worker_said_is_taken_apart():
    assert str(UsageError("Caught in the act")) == "Caught in the act"
    assert str(UsageError("dgnet.errors.UsageError: of old")) == "dgnet.errors.UsageError: of old"


@pytest.fixture
def trainer() -> Iterator[L.Trainer]:
    level = logging.getLogger("lightning.pytorch").level
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    yield L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=1)
    logging.getLogger("lightning.pytorch").setLevel(level)


def test_lightning_leaves_sigterm_alone(trainer):
    from dgnet.compat.lightning import take_sigterm

    loop, connector = trainer.fit_loop.epoch_loop, trainer._signal_connector
    assert callable(loop._broadcast_sigterm_tensor), moved("Lightning", "_broadcast_sigterm_tensor")
    assert not take_sigterm(trainer)
    connector.received_sigterm = True
    assert take_sigterm(trainer), moved("Lightning", "_signal_connector.received_sigterm")
    assert not trainer.received_sigterm, moved("Lightning", "_signal_connector.received_sigterm")
    assert "_broadcast_sigterm_tensor" in Path(sys.modules[type(loop).__module__].__file__).read_text(encoding="utf-8")


def test_lightning_hands_over_its_processes():
    from dgnet.compat.lightning import _SubprocessScriptLauncher, take_processes

    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    launcher = trainer.strategy.launcher
    if launcher is None:
        trainer.strategy._configure_launcher()
        launcher = trainer.strategy.launcher
    assert isinstance(launcher, _SubprocessScriptLauncher), moved("Lightning", "_SubprocessScriptLauncher")
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    launcher.procs.append(process)
    assert take_processes(trainer) == [process], moved("Lightning", "_SubprocessScriptLauncher.procs")
    assert launcher.procs == []


def test_lightning_in_one_process_has_none(trainer):
    from dgnet.compat.lightning import take_processes

    assert take_processes(trainer) == []


@pytest.mark.parametrize("kind", [argparse.ArgumentParser, ArgumentParser])
def test_a_parser_lists_its_options(kind):
    parser = kind()
    parser.add_argument("--lr", type=float)
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("images")
    assert {"--help", "--lr", "-v", "--verbose"} <= set(option_strings(parser)), moved("argparse", "_actions")


def test_an_error_of_a_parser_names_the_option():
    parser = Parser()
    parser.add_argument("--clip-grad", type=float)
    with pytest.raises(UsageError) as caught:
        parser.parse_args(["--clip-grad", "x"])
    assert str(caught.value).startswith("--clip-grad "), moved("argparse", "how jsonargparse reports an error of a type")
    assert str(UsageError("another\n  wording")) == "another wording"


# Private names that are used outside `dgnet.compat`, with the reason.
ALLOWED = {
    ("data/_loading.py", "_exit"): "os._exit is documented",
    ("_guard.py", "_exit"): "os._exit is documented",
    ("detection/_coco.py", "_replace"): "of a named tuple, documented",
}

OWN_MEMBERS = (nn.Module(), L.LightningModule(), L.Callback(), ArgumentParser(), io.BytesIO(), DataLoader([]))
"""Objects of other libraries of which the package has subclasses: what `self` may not touch."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name != "_"


def private_names(tree: ast.AST) -> Iterator[str]:
    """Each private name that a file takes from elsewhere or gives to a class of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_private(node.name):
            yield node.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            yield from (a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and is_private(str(a.value)))
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] != "dgnet":
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (part for part in parts if is_private(part) and node.module != "__future__")
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".") if not alias.name.startswith("dgnet")]
            yield from filter(is_private, names)


def own_names(tree: ast.AST) -> Iterator[str]:
    """The private names that a file defines: functions, methods, class and instance attributes, constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def test_no_other_file_touches_a_private_name_of_another_library():
    trees = {str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}
    files = {name: tree for name, tree in trees.items() if not name.startswith("compat/")}
    foreign = {name for thing in OWN_MEMBERS for name in dir(thing)}
    own = {name for tree in files.values() for name in own_names(tree)} - foreign
    modules = {Path(name).stem for name in files}
    used = {(file, name) for file, tree in files.items() for name in private_names(tree) if name not in own | modules}
    unexpected = sorted(used - ALLOWED.keys())
    assert not unexpected, f"private names of other libraries belong in dgnet/compat: {unexpected}"
    assert not ALLOWED.keys() - used, "no longer used: take them out of ALLOWED"


def test_importing_the_package_imports_no_lightning():
    code = "import sys, dgnet; sys.exit('lightning' in sys.modules or 'dgnet.compat.lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_timm_builds_feature_extractors_of_the_class_that_conversion_expects():
    features = timm.create_model("test_vit", features_only=True)
    assert isinstance(features, FeatureGetterNet), moved("timm", "FeatureGetterNet")
    assert features(torch.zeros(1, 3, 160, 160))[0].ndim == 4


def test_timms_efficient_networks_have_the_squeeze_and_excitation_that_detection_expects():
    network = timm.create_model("mobilenetv3_small_050")
    found = [module for module in network.modules() if isinstance(module, EfficientSqueezeExcite)]
    assert found, moved("timm", "SqueezeExcite")
    feature = torch.randn(2, found[0].conv_reduce.in_channels, 3, 4)
    reads = []
    found[0].conv_reduce.register_forward_pre_hook(lambda module, inputs: reads.append(inputs[0]))
    found[0](feature)
    torch.testing.assert_close(reads[0], feature.mean((2, 3), keepdim=True))


def test_tensors_are_found_in_nested_containers():
    one, two = torch.zeros(1), torch.ones(1)
    assert [id(t) for t in find_tensors(([one, 3], {"a": (two, "b")}, None))] == [id(one), id(two)], moved(
        "torch", "tree_leaves"
    )
    assert find_leaves(((1, None), {"a": "b"})) == [1, None, "b"], moved("torch", "tree_leaves")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_changes_in_place_are_counted(device):
    tensor = torch.zeros(2, device=device)
    before = count_writes(tensor)
    tensor + 1
    assert count_writes(tensor) == before
    tensor.view(1, 2).relu_()
    assert count_writes(tensor) > before, moved("torch", "Tensor._version")
