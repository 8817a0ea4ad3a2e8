"""What a device's memory allows: how many rows of logits are made at a time, and what is said when
even they do not fit.

The size of a chunk decides in what order the head's gradient is summed, so it comes from the
device's *whole* memory, and from what is free only where that would not fit: two runs on one device
have the same bits unless one of them was short of memory.
"""

import functools

import torch

CHUNK_BYTES = None  # of a [chunk, V] block of logits, whatever the device; None: `chunk_bytes`
FEW_BYTES, MOST_BYTES = 256 << 20, 2 << 30
SHARE = 32  # of the device's memory
TILE = 128  # rows of a GEMM's tile: a chunk is a multiple of it where there are so many


@functools.cache
def total(device):
    """Bytes of memory of a CUDA device."""
    return torch.cuda.get_device_properties(device).total_memory


def free(device):
    """Bytes that a CUDA device can still give: the driver's, and what the allocator holds back."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def chunk_bytes(device, wanted):
    """Bytes of a block of logits on this device, of which `wanted` are to be made in all.

    Each chunk reads and writes the fp32 gradient of the head once more, 8 bytes an element: hidden
    behind the 2 flops an element and row of its product from about 1,000 rows on, so that 2,048
    leave it half hidden. 2 GiB are 4,096 rows of 131,072 logits.
    """
    if CHUNK_BYTES is not None:
        return CHUNK_BYTES
    if device is None or device.type != "cuda":
        return FEW_BYTES
    most = min(max(total(device) // SHARE, FEW_BYTES), MOST_BYTES)
    if wanted <= FEW_BYTES or capturing(device):  # asking the driver would take longer than a loss
        return most
    there = free(device)
    while most > FEW_BYTES and 2 * most > there:
        most //= 2
    return most


def chunks(count, vocab, device=None, size=4):
    """Slices of `count` rows of `vocab` logits of `size` bytes: as few as fit, of equal lengths."""
    most = max(chunk_bytes(device, count * vocab * size) // (size * vocab), 1)
    most = most // TILE * TILE or most
    parts = max(-(-count // most), 1)
    step = max(-(-count // parts), 1)
    if parts > 1 and most % TILE == 0:
        step = -(-step // TILE) * TILE
    return [slice(at, min(at + step, count)) for at in range(0, count, step)]


def says(launcher):
    """A launcher of (hidden, weight, ...) whose out-of-memory error says what the op needs beside
    its inputs, and what would fit. It stays a torch.OutOfMemoryError: who retries on one goes on
    doing so."""

    @functools.wraps(launcher)
    def run(hidden, weight, *rest, **options):
        try:
            return launcher(hidden, weight, *rest, **options)
        except torch.OutOfMemoryError as e:
            needs = [x for x in rest if isinstance(x, list) and x and isinstance(x[0], bool)]
            needs = [*(needs or [[]])[-1], False, False, False]
            text = what_fits(launcher.__name__, hidden, weight, needs)
            raise torch.OutOfMemoryError(f"{text}. {e}") from e

    return run


def what_fits(name, hidden, weight, needs):
    """What a call needs, what is free, and what to do about it."""
    rows, (vocab, width) = hidden.shape[0], weight.shape
    fixed, each = needed(width, vocab, hidden.element_size(), needs)
    there = free(hidden.device) if hidden.is_cuda else 0
    block = 4 * TILE * vocab  # the least chunk
    fit = max((there - fixed - block) // each, 0)
    text = (
        f"{name}: out of memory at {rows} rows of hidden [{rows}, {width}] and weight "
        f"[{vocab}, {width}]: gradients of {_gib(fixed + each * rows)} and a block of logits of at "
        f"least {_gib(block)} are needed, {_gib(there)} are free. "
    )
    if fit and fit < rows:
        return text + f"About {fit} rows fit: pass fewer a call (`normalizer=` keeps a loss right)"
    if fixed and not fit:
        return (
            text + f"The head's fp32 gradient alone takes {_gib(fixed)}: freeze it or free memory"
        )
    return text + "Free memory first (torch.cuda.empty_cache() where it is fragmented)"


def needed(width, vocab, size, needs):
    """(bytes whatever the rows, bytes a row) of the gradients that `needs` asks for."""
    fixed = (4 * vocab * width if needs[1] else 0) + (4 * vocab if needs[2] else 0)
    return fixed, (4 * width if needs[0] else 0) + (size * width if needs[1] else 0) + 32


def _gib(count):
    return f"{count / 2**30:.2f} GiB"
