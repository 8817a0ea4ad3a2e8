"""What this machine can do: bytes copied and flops of a large matrix product, per second."""

from collections.abc import Iterable

import torch

from .clock import Clock
from .work import DTYPES

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # beyond any cache
SIDE = {"cpu": 2048, "cuda": 8192}
REPEAT = 5


def measure(
    device: torch.device, clock: Clock, dtypes: Iterable[str], scale: float = 1.0
) -> dict[str, float]:
    """{"copy": bytes/s, read and written; "fp32", ...: flop/s}. The best of REPEAT; `scale` makes
    both smaller, for tests."""
    size, side = int(COPY_BYTES[device.type] * scale), int(SIDE[device.type] * scale)
    a = torch.ones(size // 4, dtype=torch.float32, device=device)
    b = torch.empty_like(a)
    found = {"copy": 2 * a.nbytes / best(clock, lambda: b.copy_(a))}
    for name in dict.fromkeys(("fp32", *dtypes)):
        x = torch.randn(side, side, device=device).to(DTYPES[name])
        out = torch.empty_like(x)

        def product(x: torch.Tensor = x, out: torch.Tensor = out) -> object:
            return torch.mm(x, x, out=out)

        found[name] = 2 * side**3 / best(clock, product)
    return found


def best(clock: Clock, call) -> float:  # type: ignore[no-untyped-def]
    call()
    return min(clock.sample([call], 1) for _ in range(REPEAT))


def floor(roof: dict[str, float], dtype: str, flops: float, nbytes: float) -> float:
    """Seconds below which this machine cannot be: the slower of products and copies. Half
    precision may be widened, so the faster of its products and those of fp32 counts."""
    rate = max(roof[dtype], roof["fp32"])
    return max(flops / rate, nbytes / roof["copy"])
