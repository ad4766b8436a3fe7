"""What Inductor writes for an H100, compiled to machine code on a machine without a GPU.

    python -m tests.support.sm90 llama          # a process of its own; needs the package triton

Every graph that reaches Inductor is lowered for device "cuda", and every Triton kernel of every configuration is
compiled for sm_90 with Triton's own assembler. Then the graph runs operator by operator on the simulated CUDA, so that
a model prefills, decodes and trains as it would. `scaled_dot_product_attention` becomes what it becomes on an H100.

Nothing is timed, no kernel runs, and choices that Inductor makes by timing (templates of matrix products) are not made.
Wanted are PyTorch's CPU build and `pip install --no-deps triton` beside it, which brings no CUDA.
"""
