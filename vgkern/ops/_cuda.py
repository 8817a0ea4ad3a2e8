"""The cuda backend: csrc/*.cu, compiled by nvcc at first use."""

import torch


def missing(device: torch.device) -> str | None:
    """Why the cuda backend cannot run on `device`, with the remedy; None where it can."""
    return "there are no CUDA kernels in this version; use backend='triton' or 'torch'"
