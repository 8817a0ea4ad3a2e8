"""Which kernels there are, read from the source: those that a table has to show.

A `@triton.jit` function is a kernel when it is launched (`name[grid](...)`), or when it returns
nothing and no other such function calls it; the rest are helpers. In CUDA it is `__global__`.
"""

import ast
from pathlib import Path

from vgkern.gate import cuda

KERNELS = Path(__file__).resolve().parent.parent / "kernels"


def triton_kernels(folder: Path = KERNELS) -> dict[str, str]:
    """{kernel: its file} of folder/*.py."""
    jitted: dict[str, tuple[str, ast.FunctionDef]] = {}
    launched: set[str] = set()
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(_jit(d) for d in node.decorator_list):
                jitted[node.name] = (path.name, node)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(_last_name(node.func.value))
    called = set()
    for _, function in jitted.values():
        calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
        called |= {_last_name(n.func) for n in calls}
        # passed on, as a combine function is
        called |= {_last_name(a) for n in calls for a in [*n.args, *(k.value for k in n.keywords)]}
    return {
        name: file
        for name, (file, function) in jitted.items()
        if name in launched or (name not in called and not _returns_value(function))
    }


def cuda_kernels(folder: Path | None = None) -> dict[str, str]:
    """{kernel: its file} of csrc/*.cu."""
    files = cuda.sources(folder) if folder else cuda.sources()
    return {name: path.name for path in files for name in cuda.kernels(path)}


def _jit(decorator: ast.expr) -> bool:
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    return _last_name(target) == "jit"


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _returns_value(function: ast.FunctionDef) -> bool:
    return any(isinstance(n, ast.Return) and n.value is not None for n in ast.walk(function))
