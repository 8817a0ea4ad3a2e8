"""Heads of real models by name, and the rows that fit here.

A model is never made smaller: its width and vocabulary stay, the rows are cut, and the row of the
table says so.
"""

import math
from typing import NamedTuple

LEAST_ROWS = 16  # that memory must hold
TIME_ROWS = 256  # fewer to save time would be another regime: the head alone, not its rows
SEQUENCE = 256  # tokens of one sequence, where an op wants sequences
SAMPLES = 64  # rows of a decoding step


class Model(NamedTuple):
    hidden: int
    vocab: int
    rows: int  # tokens of one micro-batch


MODELS = {
    "tiny": Model(256, 512, 8192),
    "small": Model(256, 8192, 2048),
    "smollm2-135m": Model(576, 49152, 4096),
    "qwen2.5-0.5b": Model(896, 151936, 4096),
    "llama-3-8b": Model(4096, 128256, 8192),
    "qwen3-32b": Model(5120, 151936, 8192),
}


class Cut(NamedTuple):
    rows: int  # 0: not even LEAST_ROWS fit
    why: str  # "", "memory", "time"


def cut(rows: int, memory: float, time: float = math.inf) -> Cut:
    """The largest of rows, then powers of two, that memory holds and the time allows; time cuts
    no further than TIME_ROWS."""
    if memory < LEAST_ROWS:
        return Cut(0, "memory")
    time = max(time, TIME_ROWS)
    fit, why = min((memory, "memory"), (time, "time"))
    return Cut(rows, "") if rows <= fit else Cut(1 << (int(fit).bit_length() - 1), why)


def memory_rows(free: float, hidden: int, vocab: int, itemsize: int) -> float:
    """Rows whose plain PyTorch loss fits in `free` bytes, beside the head, its gradient, an fp32
    sum of it and what a rival widens to fp32."""
    head = hidden * vocab * (2 * itemsize + 2 * 4)
    return (free - head) / (vocab * (2 * itemsize + 3 * 4))
