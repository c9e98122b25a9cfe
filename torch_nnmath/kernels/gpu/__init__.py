"""The kernels on a GPU: matrix products by cuBLAS, and passes over rows by Triton.

`register_operator` imports the Triton modules when the first GPU tensor arrives.
"""
