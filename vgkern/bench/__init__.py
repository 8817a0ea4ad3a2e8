"""`python -m vgkern bench`: every op against every rival, on this machine.

shapes      real model shapes by name, cut to what the machine holds and the time allows
work        what is timed: one op at one shape; its bytes, flops and unavoidable matrix products
inputs      the tensors of it
clock       interleaved timing, medians, noise; CPU and CUDA clocks
memory      peak extra memory of one call
roof        copy bandwidth and GEMM rate of this machine
rivals/     one adapter per library, ours included
group       one op at one shape: every variant on the same tensors, its check against ours
measure     those timed in turn, as rows
plan        which groups, in which order, within how much time
run         the plan carried out, with progress
record      rows and the JSON file; table, plots, compare: what is made of it
base        the same on two versions of the code, interleaved (worker: one of the two)
offline     what is known of the GPU kernels where there is no GPU

Within the package imports are relative and from outside it is taken only what vgkern's older
versions have too: `worker` loads this folder beside another version of vgkern.
"""
