"""Temperature and truncation of a row: what `linear_sample` draws from and what
`linear_token_logprobs` scores.

    z = s(logits) / temperature                      temperature 0: only the argmax is left
    kept, in this order: top_k, then top_p of what is left, then min_p relative to max p
    what is not kept is set to -inf: probability 0 and no gradient

Each of the four is one number for all rows or a tensor with a value for each row, where top_k 0 (or
V and more), top_p 1 and min_p 0 cut nothing; a row has the bits that a call with its numbers gives.
Ties go to the lowest id, everywhere. The kept set is a constant to the gradient.
"""

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgkern.ops import _check

CUTS = ("top_k", "top_p", "min_p")
SCHEMA = (  # as operators take a `Cut`
    "float temperature, int top_k, float top_p, float min_p, Tensor? temperatures, "
    "Tensor? top_ks, Tensor? top_ps, Tensor? min_ps"
)


class Cut(NamedTuple):
    """Checked options of flattened rows. A tensor [N] takes the place of its number."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    temperatures: Tensor | None = None  # fp32, as are the last two
    top_ks: Tensor | None = None  # int64
    top_ps: Tensor | None = None
    min_ps: Tensor | None = None

    def of_rows(self, shape: torch.Size, device: torch.device) -> tuple[Tensor, tuple]:
        """(temperature [...], (top_k, top_p, min_p), each a number or [...]) for the references."""
        t = self.temperatures
        if t is None:  # see _library
            t = torch.zeros(shape, dtype=torch.float32, device=device) + self.temperature
        t = t.view(shape)
        rows = (self.top_ks, self.top_ps, self.min_ps)
        good = t >= 0  # a value out of bounds that nobody looked at makes its row NaN
        if self.top_ps is not None:
            good = good & ((self.top_ps > 0) & (self.top_ps <= 1)).view(shape)
        if self.min_ps is not None:
            good = good & ((self.min_ps >= 0) & (self.min_ps <= 1)).view(shape)
        t = t.where(good, torch.nan)
        pairs = zip(self[1:4], rows, strict=True)
        return t, tuple(x if r is None else r.view(shape) for x, r in pairs)


def truncated_ref(
    logits: Tensor,  # [..., V] fp32|fp64
    temperature: Tensor,  # [...] >= 0
    softcap: float = 0.0,
    top_k: int | Tensor = 0,  # one, or one per row [...], as the next two
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> Tensor:
    z = logits
    if softcap:
        z = (softcap * torch.tanh(z / softcap)).where(z != -torch.inf, -torch.inf)  # still blocked
    greedy = (temperature == 0)[..., None]
    z = z / temperature[..., None].to(z.dtype).where(~greedy, 1)
    with torch.no_grad():
        order = torch.argsort(z, dim=-1, descending=True, stable=True)  # ties: the lowest id first
        rank = torch.arange(z.shape[-1], device=z.device)
        top_k, top_p, min_p = (
            (torch.zeros((), dtype=d, device=z.device) + x).to(d)[..., None]  # see _library
            for x, d in ((top_k, torch.int64), (top_p, torch.float64), (min_p, z.dtype))
        )
        first = (rank < top_k) | (top_k <= 0)
        p = z.gather(-1, order).masked_fill(~first, -torch.inf).softmax(-1)
        mass = top_p.masked_fill(top_p >= 1, torch.inf).to(z.dtype)  # a rounded sum may reach 1
        kept = (p.cumsum(-1) - p < mass) & (p >= min_p * p[..., :1]) & first & ~greedy
        kept = kept | (rank == 0)  # the most likely token always stays
        kept = torch.zeros_like(kept).scatter(-1, order, kept) | z.isnan().any(-1, keepdim=True)
    return z.masked_fill(~kept, -torch.inf)


def cut_of(
    temperature: float | Tensor,
    top_k: int | Tensor | None,
    top_p: float | Tensor | None,
    min_p: float | Tensor | None,
    vocab: int,
    shape: torch.Size,  # of the rows
    device: torch.device,
) -> Cut:
    """The options, checked. Raises ValueError or TypeError that names the one; values of tensors
    are looked at on CPU, elsewhere one out of bounds makes its row NaN."""
    numbers: list[Any] = [_check.number(x) for x in (temperature, top_k, top_p, min_p)]
    temperature, top_k, top_p, min_p = numbers
    if (not isinstance(temperature, Tensor) and temperature != 0) or isinstance(temperature, bool):
        _check.positive("temperature", temperature)
    whole = isinstance(top_k, Tensor) or (isinstance(top_k, int) and not isinstance(top_k, bool))
    if top_k is not None and (not whole or (not isinstance(top_k, Tensor) and top_k < 1)):
        raise _check.fail("top_k", top_k, "an int >= 1, an int64 tensor, or None for no limit")
    if not _number(top_p, lambda x: 0 < x <= 1):
        raise _check.fail("top_p", top_p, "0 < top_p <= 1, a tensor of such, or None")
    if not _number(min_p, lambda x: 0 <= x <= 1):
        raise _check.fail("min_p", min_p, "0 <= min_p <= 1, a tensor of such, or None")
    numbers = [d if x is None or (isinstance(x, Tensor) and x.ndim) else x
               for x, d in zip(numbers, (1.0, 0, 1.0, 0.0), strict=True)]  # fmt: skip
    if not isinstance(numbers[1], Tensor) and numbers[1] >= vocab:
        numbers[1] = 0
    if not torch.compiler.is_compiling():  # a conversion would burn the number in
        numbers = [kind(x) for kind, x in zip((float, int, float, float), numbers, strict=True)]
    where = (shape, device)
    return Cut(
        numbers[0], numbers[1], numbers[2], numbers[3],
        _rows("temperature", temperature, *where, lambda x: (x >= 0) & x.isfinite(),
              "finite numbers >= 0"),
        _rows("top_k", top_k, *where, lambda x: x >= 0, "integers >= 0, where 0 is no limit"),
        _rows("top_p", top_p, *where, lambda x: (x > 0) & (x <= 1), "0 < top_p <= 1"),
        _rows("min_p", min_p, *where, lambda x: (x >= 0) & (x <= 1), "0 <= min_p <= 1"),
    )  # fmt: skip


def _number(x: object, fits: Any) -> bool:
    if x is None or isinstance(x, Tensor):
        return True
    return isinstance(x, Real) and not isinstance(x, bool) and fits(x)


def _rows(
    name: str, x: object, shape: torch.Size, device: torch.device, fits: Any, allowed: str
) -> Tensor | None:
    """A value for each flattened row, fp32 or int64; None where `x` is none or one for all."""
    if not isinstance(x, Tensor) or not x.ndim:
        return None
    x = _check.rows_like(name, x, shape, f"a number or {list(shape)}")
    whole = name == "top_k"
    if whole and x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: got {_check.describe(x)}; allowed: an int64 or int32 tensor")
    if _check.can_look(x.device) and x.numel():
        good = fits(x)
        if not bool(good.all()):
            at = (~good).nonzero()[0].tolist()
            raise _check.fail(name, f"{x[tuple(at)].item()} at {at}", allowed)
    dtype = torch.int64 if whole else torch.float32
    return x.detach().to(device, dtype).reshape(-1).contiguous()
