"""One phase, in this process. Ends with 3 where torch sees no GPU."""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from vgkern.gpu.device import Phase

PHASES = (
    "facts", "build", "smoke", "tokens", "timing", "graphs", "parity", "train", "profile",
)  # fmt: skip
NO_GPU = 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vgkern.gpu")
    parser.add_argument("phase", choices=(*PHASES, "compile"))  # compile: a worker of build
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that this phase has")
    parser.add_argument("--dry", action="store_true", help="toy sizes, without a GPU")
    parser.add_argument("--share", default="0/1", help="of the work: I/N, for compile")
    given = parser.parse_args(arguments)
    if not given.dry and not torch.cuda.is_available():
        print(f"vgkern.gpu: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return NO_GPU
    phase = Phase(given.phase, given.out, given.limit, given.dry)
    phase.share = tuple(int(x) for x in given.share.split("/"))
    importlib.import_module(f"vgkern.gpu.{given.phase}").run(phase)
    return 0


if __name__ == "__main__":
    sys.exit(main())
