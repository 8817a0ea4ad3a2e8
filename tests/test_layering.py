"""Imports point one way, and nothing in the package can run code that it reads from a file."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# A module may import what has at most its own rank; `vgkern` itself is the public names.
RANK = {
    "kernels": 0, "objectives": 0, "errors": 0, "logit_scale": 0,
    "ops._check": 1, "ops._compile": 1, "ops._interpreter": 1, "ops._gpu": 1,
    "ops._library": 2, "ops._native": 2, "ops._cuda_build": 2, "ops._cuda_truncated": 2,
    "ops._backend": 3, "ops._cuda": 3, "ops._cuda_continuous": 3,
    "ops": 4,
    "": 5, "nn": 5, "tasks": 5, "costate": 5, "case_inputs": 5, "cases": 5,
    "bench": 6, "gate": 6, "train": 6,
    "integrations": 7, "use": 7, "gpu": 7, "doctor": 7, "__main__": 8,
}  # fmt: skip
CODE_RUNNING_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CODE_RUNNING_CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load"}


def modules() -> dict[str, tuple[str, ast.Module]]:
    """{dotted name below vgkern: (its package, syntax tree)}."""
    found = {}
    # kernels/ is a link, which rglob does not follow
    for path in [*(ROOT / "vgkern").rglob("*.py"), *(ROOT / "vgkern" / "kernels").glob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[1:]).removesuffix("__init__").strip(".")
        found[name] = (".".join(parts[:-1]), ast.parse(path.read_text()))
    return found


def rank(name: str) -> int:
    found = RANK.get(name, RANK.get(name.split(".")[0]))
    assert found is not None, f"vgkern.{name}: give it a rank in tests/test_layering.py"
    return found


def imported(package: str, tree: ast.Module) -> list[str]:
    """Full names, those of things in modules included."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names += [f"{base}.{a.name}" for a in node.names]
    return names


def test_imports_point_one_way():
    trees, wrong, seen = modules(), [], 0
    for name, (package, tree) in trees.items():
        for target in imported(package, tree):
            if target != "vgkern" and not target.startswith("vgkern."):
                continue
            seen += 1
            target = target.removeprefix("vgkern").strip(".")
            while target not in trees:  # the name of a thing in the module
                target = target.rpartition(".")[0]
            leaf = target.startswith("integrations.") and not name.startswith("integrations")
            if rank(target) > rank(name) or leaf:
                wrong.append(f"vgkern.{name} imports vgkern.{target}")
    assert seen > 30 and not wrong, wrong


def test_kernels_and_csrc_stand_alone():
    assert not (ROOT / "kernels" / "__init__.py").exists()  # PyPI has a package of that name
    for path in (ROOT / "kernels").glob("*.py"):
        names = imported("kernels", ast.parse(path.read_text()))
        own = [n for n in names if n.startswith("vgkern") and not n.startswith("vgkern.kernels.")]
        assert not own, (path, own)
    for path in (ROOT / "csrc").glob("*.*"):
        text = path.read_text()
        assert "Python.h" not in text and "torch/extension.h" not in text, path


def test_nothing_runs_code_from_a_file():
    wrong = []
    for name, (package, tree) in modules().items():
        tops = {n.split(".")[0] for n in imported(package, tree)}
        wrong += [(name, top) for top in tops & CODE_RUNNING_IMPORTS]
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            asked = {keywords.get("allow_pickle", "False"), keywords.get("shell", "False")}
            if ast.unparse(call.func) in CODE_RUNNING_CALLS or asked != {"False"}:
                wrong.append((name, ast.unparse(call)))
    assert not wrong, wrong
