"""`python -m vgkern COMMAND`. Each command imports only what it needs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable

COMMANDS = {
    "train": "train a language model with RL (--help lists every setting)",
    "sample": "write on from a prompt with any checkpoint",
    "eval": "score a checkpoint on held-out prompts: greedy, avg@n, pass@k, with intervals",
    "export": "write a checkpoint as a plain Hugging Face folder",
    "probe": "say what a checkpoint's costates say: signal, headroom, norms (and a picture)",
    "impact": "rank checkpoints by what RL will gain from them, before it is paid for",
    "bench": "time every op against the others on this machine (--quick: two minutes)",
    "build": "compile the native kernels now, into the cache",
    "doctor": "say which backends run here, which do not and why, and what to install",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vgkern",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS)
    given, rest = sys.argv[1:] if arguments is None else arguments, []
    if given and given[0] in COMMANDS:  # the rest belongs to the command, --help included
        given, rest = given[:1], given[1:]
    command = parser.parse_args(given).command
    if command == "doctor":
        return doctor(rest)
    if command == "probe":
        return probe(rest)
    if command in ("sample", "eval", "export", "impact"):
        return use(command, rest)
    if command == "bench":
        from vgkern.bench.cli import main as bench

        return bench(rest)
    return train(rest) if command == "train" else build(rest)


def train(arguments: list[str]) -> int:
    from vgkern.train.config import load_run

    def run() -> None:
        config, resume = load_run(arguments)
        from vgkern.train.run import train

        train(config, resume)

    return _ended("train", run, "metrics so far are kept")


def probe(arguments: list[str]) -> int:
    def run() -> None:
        from vgkern.train.probe import main

        main(arguments)

    return _ended("probe", run, "nothing was written")


def use(command: str, arguments: list[str]) -> int:
    def run() -> None:
        module = {"eval": "evaluate"}.get(command, command)
        importlib.import_module(f"vgkern.use.{module}").main(arguments)

    return _ended(command, run, "nothing more was written")


def _ended(command: str, run: Callable[[], None], interrupted: str) -> int:
    """The exit status; an error of the run is one line."""
    from vgkern.errors import RunError

    try:
        run()
    except RunError as error:
        print(f"vgkern {command}: {error}", file=sys.stderr)
        return getattr(error, "status", 2)  # a signal has its own
    except KeyboardInterrupt:
        print(f"\nvgkern {command}: interrupted; {interrupted}", file=sys.stderr)
        return 130
    return 0


def build(arguments: list[str]) -> int:
    from vgkern.ops import _native

    parser = argparse.ArgumentParser(prog="python -m vgkern build", description=COMMANDS["build"])
    parser.add_argument(
        "--cuda", action="store_true",
        help="the CUDA kernels instead, for every GPU they support (needs nvcc, no GPU)"
    )  # fmt: skip
    asked = parser.parse_args(arguments)
    try:
        from vgkern.ops import _cuda_build

        print(_cuda_build.build(_cuda_build.FAT) if asked.cuda else _native.build())
    except _native.NativeError as error:
        print(f"vgkern build: {error}", file=sys.stderr)
        return 1
    return 0


def doctor(arguments: list[str]) -> int:
    from vgkern.gate.arch import ARCHS, DEFAULT

    parser = argparse.ArgumentParser(prog="python -m vgkern doctor", description=COMMANDS["doctor"])
    parser.add_argument(
        "--kernels", action="store_true", help="compile every GPU kernel, with or without a GPU"
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHS, default=DEFAULT, help="with --kernels: sm_..."
    )
    parser.add_argument("--json", metavar="FILE", help="with --kernels: the table as JSON too")
    parser.add_argument(
        "--traffic", action="store_true",
        help="what every op launches and moves on a GPU, its least, and the time that follows"
    )  # fmt: skip
    parser.add_argument(
        "--write", action="store_true", help="with --traffic: docs/gpu-predictions.md too"
    )
    given = parser.parse_args(arguments)
    if given.traffic:
        from vgkern.gate.traffic.report import report as traffic

        return traffic(given.write)
    if not given.kernels:
        from vgkern.doctor import main as diagnose

        return diagnose()
    from vgkern.gate.doctor import report

    return report(given.arch, given.json)


if __name__ == "__main__":
    sys.exit(main())
