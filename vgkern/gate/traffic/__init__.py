"""What a public op moves and launches on a GPU, counted on a machine without one.

count     a call on tensors without data: every launch, with its bytes, its flops and the peak
aten      torch's operators: which of them launch, how often, and what they move
triton    a model of each kernel of kernels/, which a test holds to the interpreter's count
cuda      the same of each launcher of csrc/*.cu
calls     the calls that are counted: op, shape, pass
minimum   what any implementation must move, and how much more than that each call may
predict   the time that follows from the bytes, the flops and the launches
report    the tables of `python -m vgkern doctor --traffic` and of docs/gpu-predictions.md
"""
