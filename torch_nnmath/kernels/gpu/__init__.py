"""The kernels on a GPU: matrix products by cuBLAS, and passes over rows by Triton.

`dispatch.choose_implementation` imports these modules when the first GPU tensor arrives.
"""
