"""Noise that can be replayed: a counter stream keyed by *what* is sampled (formulas ours).

    word(v) = Philox4x32-10(key = seed,
                            counter = (v // 4, position, sequence_lo, sequence_hi))[v % 4]
    u = min((word + 0.5) * 2^-32, 1 - 2^-24)          g = -log(-log1p(-u))      standard Gumbel

No tile, batch, rank, device or order enters, so a training step regenerates the very noise that
chose a token in a rollout from (seed, sequence, position). The form of g is fine near u = 0, where
the argmax is decided; the usual -log(-log(u)) in fp32 is capped at 16.6, this one at 22.9.
Equal (seed, sequence, position) draw equal noise, and so equal tokens from equal distributions.
Gaussian noise has a counter plane of its own, v // 4 + 2^31, and is Box-Muller on pairs of words:
with u1, u2 the u of words 2j and 2j + 1, normals 2j and 2j + 1 are sqrt(-2 log u1) times
cos(2 pi u2) and sin(2 pi u2); at most 6.8.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from vgkern.ops import _check

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
NORMAL = 1 << 31  # the counter plane of Gaussian noise


FEW = 4096  # rows that are looked through for an address given twice
_said: set[str] = set()


@dataclass(frozen=True, init=False)
class Noise:
    """Address of the noise of every row of a sampling op.

    Args:
        seed: 0 <= seed < 2^64, one for a whole run.
        sequence: int64 [...], id of the sampled sequence, >= 0, unique within the run.
        position: int64 [...], index of the token in its sequence, 0 <= position < 2^32; or one int
            for all rows. Kept as a tensor.

    Equal (seed, sequence, position) draw equal noise: two rows that share an address and see the
    same logits get the same token. That is what replays a token; it is also what makes G samples of
    one prompt G copies of one, unless each has a `sequence` of its own. `linear_sample` warns once
    where it sees an address twice in a call (on CPU, up to 4,096 rows).

    `sequence` and `position` broadcast against each other and to the rows of the op. In a CUDA
    graph let `position` be a 0-d int64 tensor on the device, which every replay reads anew: count
    it up in place between replays. Values on a GPU are not looked at.
    Raises TypeError or ValueError that names the field.
    """

    seed: int
    sequence: Tensor
    position: Tensor

    def __init__(self, seed: int, sequence: Tensor, position: Tensor | int) -> None:
        if isinstance(position, int) and not isinstance(position, bool):
            if not 0 <= position < 2**32:
                raise _check.fail("noise.position", position, "0 <= position < 2**32")
            position = torch.tensor(position)
        object.__setattr__(self, "seed", seed)
        object.__setattr__(self, "sequence", sequence)
        object.__setattr__(self, "position", position)
        self._look()

    def _look(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"noise.seed: got {_check.describe(self.seed)}; allowed: an int")
        if not 0 <= self.seed < 2**64:
            raise _check.fail("noise.seed", self.seed, "0 <= seed < 2**64")
        for name, x, top in (("sequence", self.sequence, None), ("position", self.position, 2**32)):
            allowed = "an int64 tensor" + (" or an int" if top else "")
            x = _check.tensor(f"noise.{name}", x, allowed)
            if x.dtype != torch.int64:
                raise TypeError(f"noise.{name}: got {_check.describe(x)}; allowed: int64")
            if _check.can_look(x.device) and x.numel():
                low, high = int(x.min()), int(x.max())
                if low < 0 or (top is not None and high >= top):
                    allowed = f"0 <= {name}" + (" < 2**32" if top else "")
                    raise _check.fail(f"noise.{name}", f"values {low} to {high}", allowed)

    @property
    def signed_seed(self) -> int:
        """The seed's bits as an int64, which is all that an operator's schema can take."""
        return self.seed - 2**64 if self.seed >= 2**63 else self.seed

    def rows(
        self, shape: torch.Size, device: torch.device, name: str = "noise"
    ) -> tuple[Tensor, Tensor]:
        """(sequence, position), each int64 [N], broadcast to rows of `shape` and flattened."""
        try:
            s, p = self.sequence.expand(shape), self.position.expand(shape)
        except RuntimeError:
            got = f"sequence {list(self.sequence.shape)}, position {list(self.position.shape)}"
            raise _check.fail(name, got, f"shapes that broadcast to {list(shape)}") from None
        return _flat(s, self.sequence, device), _flat(p, self.position, device)

    def words(self, vocab: int, plane: int = 0) -> Tensor:
        """The random 32-bit words as int64 [..., vocab]; `plane` is or-ed to counter word 0."""
        shape = torch.broadcast_shapes(self.sequence.shape, self.position.shape)
        s, p = self.rows(shape, self.sequence.device)
        quads = torch.arange((vocab + 3) // 4, device=s.device) | plane
        words = philox(self.seed, (quads, p[:, None], s[:, None] & _MASK, s[:, None] >> 32))
        return torch.stack(words, -1).flatten(-2)[:, :vocab].reshape(*shape, vocab)

    def gumbel(self, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard Gumbel noise [..., vocab]: the definition that every backend follows."""
        return -torch.log(-torch.log1p(-_uniform(self.words(vocab), dtype)))

    def normal(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal noise [..., n]: the definition that every backend follows."""
        u1, u2 = _uniform(self.words(n + n % 2, NORMAL), dtype).unflatten(-1, (-1, 2)).unbind(-1)
        radius, angle = (-2 * u1.log()).sqrt(), 2 * math.pi * u2
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(-2)[..., :n]


def _flat(rows: Tensor, given: Tensor, device: torch.device) -> Tensor:
    """int64 [N] on `device`. A number on the host becomes a fill, which a CUDA graph can hold."""
    number = given.ndim == 0 and given.device.type == "cpu" != device.type
    if number and not torch.compiler.is_compiling():
        return torch.full((rows.numel(),), int(given), dtype=torch.int64, device=device)
    return rows.to(device).reshape(-1).contiguous()


def warn_of_twins(sequence: Tensor, position: Tensor) -> None:
    """Says once in a process that rows of one call have the same noise. int64 [N] each."""
    if not _check.can_look(sequence.device) or "twins" in _said:  # a graph must not depend on it
        return
    n = sequence.shape[0]
    if not 2 <= n <= FEW:
        return
    if bool((sequence[1:] > sequence[:-1]).all()):  # as usual: nothing to sort
        return
    address = torch.stack((sequence, position), 1)
    distinct, which = address.unique(dim=0, return_inverse=True)
    if len(distinct) == n:
        return
    _said.add("twins")
    first = int((which.bincount()[which] > 1).nonzero()[0])
    rows = (which == which[first]).nonzero()[:2, 0].tolist()
    warnings.warn(
        f"noise: rows {rows[0]} and {rows[1]} of one call have the same address (sequence "
        f"{int(sequence[first])}, position {int(position[first])}), as {n - len(distinct)} of {n} "
        "rows have that of another: they draw the same noise, so equal logits give equal tokens. "
        "Give every sampled sequence an id of its own (said once)",
        stacklevel=3,
    )


def _uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    """(word + 0.5) / 2^32, rounded once to `dtype`, and at most 1 - 2^-24."""
    return ((words.double() + 0.5) * 2.0**-32).to(dtype).clamp(max=1 - 2.0**-24)


def philox(seed: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of broadcastable int64 counter words in [0, 2^32); four int64 words."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _MASK, seed >> 32
    for _ in range(10):
        a, b = c0 * _M0, c2 * _M1  # wraps modulo 2^64: both halves are still right
        c0, c1 = ((b >> 32) & _MASK) ^ c1 ^ k0, b & _MASK
        c2, c3 = ((a >> 32) & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3
