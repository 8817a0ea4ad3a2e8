"""What the linear_* launchers share: fp32 logits a chunk of rows at a time, and their gradients.

GEMMs are the vendor's. The [chunk, V] block of logits is fp32 from the GEMM itself; 16-bit inputs
have the gradient of the logits, and so the operands of the backward GEMMs, in 16 bits, written over
the fp32 row that it comes from, and every product and sum in fp32. The head's gradient is summed by
its products (beta = 1): no [V, H] but the sum itself, and no pass over it. In fp16 each row of the
gradient has a power of two of its own, so that one large row does not push the others below fp16:
dh takes it off again, the rows of h in dW carry its inverse.
"""

import torch

from .memory import chunks

__all__ = ["Costates", "Grads", "added32", "beside", "chunks", "clean", "mm32", "over", "tf32"]

NO_COSTATE = -1  # the sequence of a row without one
FP16_SCALE = 256.0  # the largest coefficient of a row, where dz would leave fp16's range
FP16_SHARE = 2.0**14  # the largest h, over its row's scale, in dW: 28 binades above the subnormals


def mm32(a, b, out=None):
    """a @ b in fp32, from fp32 or 16-bit operands; into `out` where it is given."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            return torch.mm(a, b, out=out)
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a.float(), b.float(), out=out)


def added32(total, a, b):
    """total += a @ b, by the product itself; total fp32, a and b fp32 or 16-bit."""
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype != torch.float32:
            return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
        return total.addmm_(a.float(), b.float())


def tf32(x):
    """Are products of x in TF32, by torch.set_float32_matmul_precision? The logits of a tile kernel
    would differ from those that the vendor's product makes in backward, and in the sampler, by
    more than fp32's rounding: then all of them are the vendor's."""
    return x.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


def clean(x, live):
    """x with zeros in its rows that are not `live`: 0 times what they hold may be NaN in dW."""
    return x.masked_fill(~live[:, None], 0)


def beside(logits, dtype):
    """Where the gradient of these logits goes: over them, or 16-bit."""
    return logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)


def over(logits, dtype):
    """[R, V] of `dtype` over the rows of an fp32 block: each at the start of its own row."""
    return logits if dtype == torch.float32 else logits.view(dtype)[:, : logits.shape[1]]


def power(most, x):
    """The power of two, so that nothing is rounded by it, that takes x to `most` or just below."""
    return torch.exp2(torch.floor(torch.log2(most / x.clamp(min=1e-30))))


def shared(dz, h, scale):
    """(dz / scale)^T h: each row of h over its scale, all of them times one power of two."""
    h = h.float() / scale[:, None]
    up = power(FP16_SHARE, h.abs().amax())
    return mm32(dz.t(), (h * up).to(dz.dtype)) / up


class Costates:
    """Costates at the next inputs of the rows: the third term of their gradients."""

    def __init__(self, seed, tau, value, embedding, sequence, position, scale):
        self.live = (value != 0).any(-1)
        self.embedding, self.position = embedding, position
        scale = scale.expand(value.shape[0])  # one, or one per row
        self.value, self.factor = value, scale
        if embedding.dtype != torch.float16:  # whose range may lack what u has
            self.value, self.factor = (value * scale[:, None]).to(value.dtype), None
        # what row_grad skips; "expected" has no sequences but the mark
        sequence = torch.zeros_like(self.live, dtype=torch.int64) if sequence is None else sequence
        self.sequence = sequence.masked_fill(~self.live, NO_COSTATE)
        self.noise, self.expected = (seed, tau), position is None

    def pulled(self, part):
        """(u [chunk, V], its factor [chunk] or None, the noise as row_grad takes it)."""
        seed, tau = self.noise
        u = mm32(self.value[part], self.embedding.t())
        position = self.sequence if self.expected else self.position
        rows = (self.sequence[part], position[part])
        factor = None if self.factor is None else self.factor[part]
        return u, factor, (seed, *rows, tau, self.expected)

    def largest(self, part, u, factor):
        """[chunk]: what u / tau is at most in its row; 0 where there is no costate."""
        low, high = u.aminmax(dim=-1)
        most = torch.maximum(high, -low) / self.noise[1]
        most = most if factor is None else most * factor.abs()
        return most.masked_fill(~self.live[part], 0)


class Grads:
    """dhidden, dweight and dbias of a head, summed in fp32 over chunks of rows.

    `hidden` is finite in the rows that have no gradient (`clean`) where dweight is needed."""

    def __init__(self, hidden, weight, bias, needs, temperature, softcap, ignore_index, rows):
        self.hidden, self.weight, self.bias, self.needs = hidden, weight, bias, needs
        self.scalars, self.rows = (temperature, softcap, ignore_index), rows
        self.dhidden = self.dweight = self.dbias = None
        if needs[0]:
            self.dhidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)

    def add(self, part, logits, targets, logp, entropy, lse, c, e, costates=None):
        """The rows `part`, from their logits (overwritten) and statistics, each [chunk]."""
        u, factor, noise, largest = None, None, (0, None, None, 1.0, False), None
        if costates is not None:
            u, factor, noise = costates.pulled(part)
            if self.hidden.dtype == torch.float16:
                largest = costates.largest(part, u, factor)
        c, e, scale = self.scaled(c, e, 1 / self.scalars[0], largest)
        if u is not None:
            for by in (factor, scale):  # not their product, which may leave fp32
                u = u if by is None else u.mul_(by[:, None])
        dz = self.rows.row_grad(
            logits, self.bias, targets, logp, entropy, lse, c, e, u, *noise, *self.scalars,
            over(logits, self.hidden.dtype)
        )  # fmt: skip
        self.products(part, dz, scale)

    def scaled(self, c, e, times=1.0, also=None):
        """(c, e, scale [chunk]): fp16 coefficients `times` what else multiplies them, within its
        range, as is the largest of another term, `also`, multiplied alike."""
        if self.hidden.dtype != torch.float16:
            return c, e, None
        found = [] if c is None else [c.abs(), e.abs()]
        found += [] if also is None else [also]
        scale = power(FP16_SCALE, torch.stack(found).amax(0) * times)
        return *(x if x is None else x * scale for x in (c, e)), scale

    def products(self, part, dz, scale=None):
        """dh = dz W, dW += dz^T h, db += sum dz. Rows of dz come times their `scale`, powers of
        two."""
        if self.needs[0]:
            dh = mm32(dz, self.weight, self.dhidden[part])
            if scale is not None:
                dh.div_(scale[:, None])
        if self.needs[1]:
            h = self.hidden[part]
            if scale is not None:
                dw = shared(dz, h, scale)
                self.dweight = dw if self.dweight is None else self.dweight.add_(dw)
            elif self.dweight is None:
                self.dweight = mm32(dz.t(), h)
            else:
                added32(self.dweight, dz.t(), h)
        if self.needs[2]:
            ones = dz.new_ones(()).expand(dz.shape[0], 1)
            db = dz.sum(0, dtype=torch.float32) if scale is None else shared(dz, ones, scale)[:, 0]
            self.dbias = db if self.dbias is None else self.dbias.add_(db)

    def finish(self, as_input, fp32_dhidden=False):
        """The three gradients in their inputs' dtypes, or as fp32; [0] where not needed."""
        out = []
        like = (self.hidden, self.weight, self.bias)
        for grad, x, need in zip(
            (self.dhidden, self.dweight, self.dbias), like, self.needs, strict=True
        ):
            x = self.hidden if x is None else x
            dtype = x.dtype if as_input and not (fp32_dhidden and not out) else torch.float32
            if not need:
                out.append(x.new_empty(0, dtype=dtype))
            elif grad is None:  # no rows
                out.append(x.new_zeros(x.shape, dtype=dtype))
            else:
                out.append(grad.to(dtype))
        return tuple(out)
