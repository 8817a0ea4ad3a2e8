"""What `make gpu` measures on a machine with a GPU: one module a phase, each run as a process.

    python -m vgkern.gpu PHASE --out DIR --limit SECONDS [--dry]

benchmarks/gpu.py starts the phases one after another, each with a time limit of its own, so that
one that hangs or takes the CUDA context with it costs itself only. A phase appends what it finds
to DIR/gpu.jsonl, one line a fact (`vgkern.gpu.record`). With --dry every phase runs at toy size on
a machine without a GPU: on the CPU, Triton interpreted, CUDA emulated, and with stand-ins for what
only a device has (`vgkern.gpu.device`). It runs from a checkout: the oracle is that of tests/.
"""
