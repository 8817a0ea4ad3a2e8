"""What holds for every drop-in: it imports its framework when it is used, not before."""

import subprocess
import sys
import types

import pytest

from vgkern.integrations import Patch

CODE = """
import sys
import vgkern.integrations.{name} as used
assert {framework!r} not in sys.modules, "imported"
sys.modules[{framework!r}] = None  # as if it were not installed
try:
    used.{call}
except vgkern.integrations.IntegrationError as error:
    assert "cannot be imported" in str(error), error
"""


@pytest.mark.parametrize(
    "name, framework, call",
    [
        ("trl", "trl", "patch()"),
        ("verl", "verl", "register()"),
        ("verl", "verl", "patch()"),
        ("prime_rl", "prime_rl", "loss(object())"),
    ],
)
def test_frameworks_are_imported_late(name, framework, call):
    code = CODE.format(name=name, framework=framework, call=call)
    code = code.replace("    used.", "    import vgkern\n    used.")
    done = subprocess.run([sys.executable, "-c", code + "else: raise SystemExit(2)"])
    assert done.returncode == 0


def test_transformers_is_imported_late():
    code = "import sys, vgkern.integrations.transformers; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_patch_that_fails_half_way_leaves_nothing_behind():
    module = types.ModuleType("module")
    module.f = 1
    with pytest.raises(TypeError, match="immutable"):
        Patch(lambda _: [(module, "f", 2), (module, "g", 3), (int, "bit_length", 4)])
    assert module.f == 1 and not hasattr(module, "g") and not Patch._on
