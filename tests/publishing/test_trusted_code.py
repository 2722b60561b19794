"""Code that a published network names: whatever its module does when it is imported, the answer is one line."""

from __future__ import annotations

import json
import sys

import pytest

import dgnet
from dgnet.code import find_code, trust_code
from dgnet.errors import UsageError

MODULES = {
    "good": "print('noise')\nclass A:\n    class B: pass\n",
    "raises": "raise ValueError('two\\nlines')",
    "ends": "import sys; sys.exit(3)",
    "lacks_attribute": "import os; os.nothing_here",
    "lacks_module": "import nowhere_at_all",
    "is_no_code": "def (",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    for name, text in MODULES.items():
        (tmp_path / f"trusted_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in MODULES:
        sys.modules.pop(f"trusted_{name}", None)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("raises.A", r"trusted_raises cannot be imported \(ValueError: two lines\)"),
        ("ends.A", r"trusted_ends cannot be imported \(it calls exit\(3\)\)"),
        ("lacks_attribute.A", r"trusted_lacks_attribute cannot be imported \(AttributeError: .*nothing_here"),
        ("lacks_module.A", r"trusted_lacks_module cannot be imported \(ModuleNotFoundError: .*nowhere_at_all"),
        ("is_no_code.A", r"trusted_is_no_code cannot be imported \(SyntaxError"),
        ("missing.A", r"trusted_missing cannot be imported: there is no such module"),
        ("good.missing.A", r"trusted_good.missing cannot be imported: there is no such module"),
        ("good.C", r"trusted_good has no C; install the version"),
        ("good.A.C", r"trusted_good.A has no C; install the version"),
    ],
)
def test_what_cannot_be_imported_is_said_in_one_line(path, message, modules):
    name = path.partition(".")[0]
    with trust_code(f"trusted_{name}"), pytest.raises(UsageError, match=f"router: {message}") as found:
        find_code(f"trusted_{path}", "router")
    assert "\n" not in str(found.value)


def test_a_class_in_a_class_is_found_and_stdout_stays_a_document(modules, capsys):
    with trust_code([" trusted_good "]):
        assert find_code("trusted_good.A.B", "router").__qualname__ == "A.B"
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "noise\n")


@pytest.mark.parametrize("modules", [None, 5, [None], b"tests"])
def test_what_names_no_package_is_refused(modules):
    with pytest.raises(UsageError, match="trust_code is the name of a package"):
        dgnet.create_model("dg_resnet20", trust_code=modules)


@pytest.mark.parametrize("path", ["os.system", "good.A", "trusted_good2.A"])
def test_a_file_that_names_other_code_is_not_obeyed(path, tmp_path, modules):
    config = {"architecture": "dg_resnet20", "num_classes": 2, "model_args": {"weighting": path}, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"run only if you trust it: trust_code="):
        dgnet.create_model(f"local-dir:{tmp_path}", trust_code="trusted_good")
    assert "trusted_good" not in sys.modules
