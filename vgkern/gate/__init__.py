"""What the GPU kernels compile to, on a machine without a GPU.

launches    the launches of real use, one list: shapes, dtypes, options
record      launchers run on tensors without data; every `kernel[grid](...)` becomes a compile
cuda        csrc/*.cu by nvcc
cubin       registers, spills, shared memory and instructions of what came out
arch        what one multiprocessor holds: blocks that fit, occupancy
limits      what a kernel may not do
table       all of it for several GPUs, cached, as `python -m vgkern doctor --kernels`
"""
