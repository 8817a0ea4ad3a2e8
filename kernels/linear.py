"""What the linear_* launchers share: fp32 logits a chunk of rows at a time, and their gradients.

GEMMs are the vendor's. The [chunk, V] block of logits is fp32 from the GEMM itself; 16-bit inputs
have the gradient of the logits, and so the operands of the backward GEMMs, in 16 bits, and every
product and sum in fp32. Every row costs its GEMMs: to compact the live ones would be a host sync.
"""

import torch

LOGITS_BYTES = 256 << 20  # of a [chunk, V] fp32 block
NO_COSTATE = -1  # the sequence of a row without one
FP16_SCALE = 256.0  # the largest coefficient of a chunk, where dz would leave fp16's range


def mm32(a, b):
    """a @ b in fp32, from fp32 or 16-bit operands."""
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == torch.float32:
            return torch.mm(a, b)
        if a.is_cuda:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a.float(), b.float())


def chunks(count, vocab):
    """Slices of `count` rows, of equal lengths within the byte budget."""
    most = max(LOGITS_BYTES // (4 * vocab), 1)
    most = most // 128 * 128 or most
    parts = max(-(-count // most), 1)
    step = max(-(-count // parts), 1)
    return [slice(at, min(at + step, count)) for at in range(0, count, step)]


class Costates:
    """Costates at the next inputs of the rows: the third term of their gradients."""

    def __init__(self, seed, tau, value, embedding, sequence, position, scale):
        self.live = (value != 0).any(-1)
        self.embedding, self.position, self.scale = embedding, position, scale
        self.fp16 = embedding.dtype == torch.float16  # may overflow where the product does not
        self.value = value if self.fp16 else (value * scale).to(value.dtype)
        # what row_grad skips; "expected" has no sequences but the mark
        sequence = torch.zeros_like(self.live, dtype=torch.int64) if sequence is None else sequence
        self.sequence = sequence.masked_fill(~self.live, NO_COSTATE)
        self.noise, self.expected = (seed, tau), position is None

    def pulled(self, part, bounded):
        """(u [chunk, V], the noise as row_grad takes it, with `bounded` the largest of u / tau)."""
        seed, tau = self.noise
        u = mm32(self.value[part], self.embedding.t())
        if self.fp16:
            u *= self.scale
        position = self.sequence if self.expected else self.position
        rows = (self.sequence[part], position[part])
        largest = u.abs().amax() / tau if bounded and u.numel() else None
        return u, (seed, *rows, tau, self.expected), largest


class Grads:
    """dhidden, dweight and dbias of a head, summed in fp32 over chunks of rows."""

    def __init__(self, hidden, weight, bias, needs, temperature, softcap, ignore_index, rows):
        self.hidden, self.weight, self.bias, self.needs = hidden, weight, bias, needs
        self.scalars, self.rows = (temperature, softcap, ignore_index), rows
        self.dhidden = self.dweight = self.dbias = None
        if needs[0]:
            self.dhidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)

    def add(self, part, logits, targets, logp, entropy, lse, c, e, costates=None):
        """The rows `part`, from their logits (overwritten) and statistics, each [chunk]."""
        live = None if c is None else (c != 0) | (e != 0)
        u, noise, largest = None, (0, None, None, 1.0, False), None
        if costates is not None:
            live = costates.live[part] if live is None else live | costates.live[part]
            u, noise, largest = costates.pulled(part, self.hidden.dtype == torch.float16)
        c, e, scale = self.scaled(c, e, 1 / self.scalars[0], largest)
        if u is not None and scale is not None:
            u *= scale
        dz = self.rows.row_grad(
            logits, self.bias, targets, logp, entropy, lse, c, e, u, *noise, *self.scalars,
            self.place(logits)
        )  # fmt: skip
        self.products(part, dz, live, scale)

    def place(self, logits):
        """Where the gradient of these logits goes: over them, or 16-bit."""
        dtype = self.hidden.dtype
        return logits if dtype == torch.float32 else torch.empty_like(logits, dtype=dtype)

    def scaled(self, c, e, times=1.0, also=None):
        """(c, e, scale): fp16 coefficients `times` what else multiplies them, within its range,
        as is the largest of another term, `also`, multiplied alike."""
        if self.hidden.dtype != torch.float16:
            return c, e, None
        found = [] if c is None else [(torch.maximum(c.abs(), e.abs()) * times).amax()]
        found += [] if also is None else [also * times]
        largest = torch.stack(found).amax().clamp(min=1e-30)
        scale = torch.exp2(torch.floor(torch.log2(FP16_SCALE / largest)))  # so nothing is rounded
        return *(x if x is None else x * scale for x in (c, e)), scale

    def products(self, part, dz, live, scale=None):
        """dh = dz W, dW += dz^T h, db += sum dz; `live` rows only: the others may hold NaN."""

        def unscaled(x):
            return x if scale is None else x / scale

        if self.needs[0]:
            self.dhidden[part] = unscaled(mm32(dz, self.weight))
        if self.needs[1]:
            h = self.hidden[part].masked_fill(~live[:, None], 0)
            dw = unscaled(mm32(dz.t(), h))
            self.dweight = dw if self.dweight is None else self.dweight.add_(dw)
        if self.needs[2]:
            db = unscaled(dz.sum(0, dtype=torch.float32))
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
