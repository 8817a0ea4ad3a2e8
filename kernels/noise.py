"""The replayable noise of vgkern.ops.noise in a Triton kernel: words, Gumbel, standard normal.

The words are the same on every backend. Counter word 0 is element // 4; its top bit is the plane of
the Gaussian stream, where words (0, 1) and (2, 3) of a quad make one Box-Muller pair each.
`seed` is the 64-bit seed as int64, two's complement.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

GUMBEL = tl.constexpr(0)
NORMAL = tl.constexpr(0x80000000)


@triton.jit
def words(seed, sequence, position, first, BLOCK: tl.constexpr, PLANE: tl.constexpr):
    """uint32 [BLOCK]: the words of elements first .. first + BLOCK - 1; `first` a multiple of 4."""
    seed, sequence = tl.cast(seed, tl.int64), tl.cast(sequence, tl.int64)  # small ints come as i32
    quad = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32) | PLANE
    zero = tl.zeros_like(quad)
    c1 = zero + tl.cast(position, tl.uint32)
    c2 = zero + sequence.to(tl.uint32)
    c3 = zero + (sequence >> 32).to(tl.uint32)
    k0 = zero + seed.to(tl.uint32)
    k1 = zero + (seed >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(quad, c1, c2, c3, k0, k1)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])


@triton.jit
def uniform(word):
    """(word + 0.5) / 2^32 in (0, 1 - 2^-24], rounded once, as every backend does."""
    return tl.minimum((word.to(tl.int64) * 2 + 1).to(tl.float32) * (2.0**-33), 1 - 2.0**-24)


@triton.jit
def gumbel(seed, sequence, position, first, BLOCK: tl.constexpr):
    """Standard Gumbel noise fp32 [BLOCK] of vocabulary ids first .. first + BLOCK - 1."""
    u = uniform(words(seed, sequence, position, first, BLOCK, GUMBEL))
    return -tl.log(-libdevice.log1p(-u))


@triton.jit
def pair(u1, u2):
    """The two standard normals of a pair of uniforms."""
    radius = tl.sqrt_rn(-2 * tl.log(u1))
    half_turns = 2 * u2  # exact; of tl.cos, reducing any argument would be most of the kernel
    return radius * libdevice.cospi(half_turns), radius * libdevice.sinpi(half_turns)


@triton.jit
def normal(seed, sequence, position, first, BLOCK: tl.constexpr):
    """Standard normal noise fp32 [BLOCK] of elements first .. first + BLOCK - 1."""
    u = uniform(words(seed, sequence, position, first, BLOCK, NORMAL))
    u1, u2 = tl.split(tl.reshape(u, [BLOCK // 2, 2]))
    even, odd = pair(u1, u2)
    return tl.reshape(tl.join(even, odd), [BLOCK])
