"""Times one version of vgkern on orders from `base`; run by path, in a process of its own:

    PYTHONPATH=<the version under test> python -P <this file> <backend>

One JSON order per line on stdin, one JSON answer per line on stdout. `import vgkern` is the version
under test, which may be older than this file; the benchmark is this folder, under another name, so
that both versions are timed by the same code on the same inputs.
"""

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any


def this_folder() -> str:
    """The package of this file as `_vgkern_bench`, beside whatever `vgkern` is."""
    name, here = "_vgkern_bench", Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        name, here / "__init__.py", submodule_search_locations=[str(here)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return name


class Worker:
    def __init__(self, backend: str) -> None:
        import torch

        self.torch, self.variant = torch, f"vgkern {backend}"
        package = this_folder()
        self.group = importlib.import_module(f"{package}.group")
        self.work = importlib.import_module(f"{package}.work")
        self.run = importlib.import_module(f"{package}.run")
        self.runs: list[Any] = []
        self.clock: Any = None

    def hello(self, threads: int) -> dict[str, Any]:
        import vgkern

        self.torch.set_num_threads(threads)
        return {"vgkern": vgkern.__version__, "where": str(Path(vgkern.__file__).parent)}

    def start(self, work: dict[str, Any], device: str) -> dict[str, Any]:
        self.runs = []  # the memory of the group before
        where = self.torch.device(device)
        self.clock = self.run.clock_for(where)
        group = self.group.Group(self.work.Work(**work), where)
        self.runs = [group.call(self.variant, x) for x in group.xs]
        self.runs[0]()
        return {}

    def sample(self, calls: int) -> dict[str, Any]:
        return {"seconds": self.clock.sample(self.runs, calls)}


def main(backend: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    worker = Worker(backend)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(worker, order.pop("do"))(**order)
        except Exception as error:
            text = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {text[0][:200]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
