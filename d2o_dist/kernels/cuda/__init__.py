"""CUDA C++ for the step of every token: append, scores, and an eviction in one launch. A plain C library, and ctypes.

It is built by `python -m d2o_dist.kernels.cuda.build`, and by an installation that finds nvcc; it is loaded when it is
first used, which is only after `set_backend("cuda")`. The same source, built by a C++ compiler as loops over blocks and
threads, is what the tests run without a GPU.
"""
