"""Shared by every test: backends, NaN-poisoned memory, the table of measured ratios."""

import os
import shutil

import pytest

# Read when torch loads. Several processes of tests share the cores: threads that spin at the end
# of every loop would take five times the CPU time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from emulation import build as emulation

from vgkern.ops import _backend

torch.set_num_threads(2)


def pytest_addoption(parser):
    parser.addoption("--ratios", action="store_true", help="print error(backend) / error(eager)")


# The backends that a run of the tests covers: Triton's interpreter needs a process of its own.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
BACKENDS = ("triton",) if INTERPRETED else ("torch", "cpu", "cuda")
EMULATED = ("triton", "cuda")  # seconds where a GPU takes microseconds
LACKS = {("linear_divergence", "cuda")}  # its row maths is Triton's and the CPU's only


def emulate_cuda() -> None:
    """The cuda backend on CPU tensors: its kernels run by tests/emulation, built at first need."""
    if "VGKERN_CUDA_LIBRARY" in os.environ:
        return
    why = emulation.missing()
    if why and (os.environ.get("CI") or shutil.which("nvcc")):
        pytest.fail(f"the CUDA kernels must be tested here, but there is {why}")
    if why:
        pytest.skip(f"the CUDA kernels cannot be emulated: {why}")
    os.environ["VGKERN_CUDA_LIBRARY"] = str(emulation.build())


if INTERPRETED:  # before any kernel is imported
    import interpreter

    interpreter.watch()

    from vgkern.kernels import logits

    logits.MAX_BLOCK = 512  # so that a row takes several blocks


def pytest_collection_modifyitems(config, items):
    """Without a GPU the tests for one are left out, not listed as a thousand skips."""
    if not torch.cuda.is_available():
        gpu = [i for i in items if "gpu" in i.keywords]
        config.hook.pytest_deselected(items=gpu)
        items[:] = [i for i in items if "gpu" not in i.keywords]


def skip_unless_runs(backend: str) -> None:
    if backend == "cuda":
        emulate_cuda()
    why = _backend._missing(backend, torch.device("cpu")) if backend != "torch" else None
    if why:
        pytest.skip(f"backend {backend} does not run here: {why}")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend in turn; skips where it cannot run."""
    skip_unless_runs(request.param)
    name = request.node.callspec.params.get("name", "")
    for op in (str(name).partition("-")[0], request.module.__name__.removeprefix("test_")):
        if (op, request.param) in LACKS:
            pytest.skip(f"{op} has no kernels for {request.param}")
    return request.param


@pytest.fixture(autouse=True)
def poisoned():
    """`torch.empty`, at::empty included, is NaN (int: the largest): no unwritten output passes."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


RATIOS: list = []


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--ratios") or not RATIOS:
        return
    worst: dict = {}
    for r in RATIOS:
        key = (r.op, r.backend, r.dtype, r.tensor)
        if key not in worst or r.used > worst[key].used:
            worst[key] = r
    line = terminalreporter.write_line
    terminalreporter.section("error(backend) / error(eager), worst case; allowed 2 plus the floor")
    line("| op | backend | dtype | tensor | error | eager | ratio | share allowed | case |")
    line("|---|---|---|---|---|---|---|---|---|")
    for (op, backend, dtype, tensor), r in sorted(worst.items()):
        ratio = f"{r.error / r.eager:.2f}" if r.eager else "-"
        line(
            f"| {op} | {backend} | {dtype} | {tensor} | {r.error:.1e} | {r.eager:.1e} | {ratio} "
            f"| {r.used:.2f} | {r.case} |"
        )
