"""What the byte and flop model says that a GPU will measure; shown beside what it measured.

A prediction is met where the measurement is at most `predicted`. Plain data: benchmarks/gpu.py
reads it without importing vgkern.
"""

MODEL = "byte and flop model, 790 TFLOP/s bf16 and 3.0 TB/s"
_LOSS = {"name": "linear_policy_loss", "backend": "triton", "dtype": "bf16"}

PREDICTIONS = (
    {**_LOSS, "shape": "8192x4096x131072", "metric": "ms", "predicted": 42.0, "source": MODEL},
    {**_LOSS, "shape": "8192x576x49152", "metric": "ms", "predicted": 3.0, "source": MODEL},
    {**_LOSS, "shape": "8192x4096x131072", "metric": "device_ms", "predicted": 42.0,
     "source": MODEL},
    {**_LOSS, "shape": "8192x576x49152", "metric": "device_ms", "predicted": 3.0, "source": MODEL},
    {**_LOSS, "shape": "1024x256x512", "metric": "launches", "predicted": 20, "source": "counted"},
    {**_LOSS, "shape": "8192x4096x131072", "metric": "peak_MiB", "predicted": 4608,
     "source": "one fp32 [V, H] and 2.5 GiB"},
)  # fmt: skip
