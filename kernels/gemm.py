"""Matrix products, by BLAS. Two-dimensional arrays of one dtype; `out` is C-contiguous, operands may be transposed views."""

import numpy as np
from scipy.linalg import blas


def matmul(out, a, b):
    """out = a @ b. out (M,N), a (M,K), b (K,N)."""
    np.dot(a, b, out=out)


def matmul_add(out, a, b):
    """out += a @ b without a temporary. out (M,N), a (M,K), b (K,N)."""
    gemm = blas.sgemm if out.dtype == np.float32 else blas.dgemm
    # BLAS is column-major: it is asked for out^T = b^T a^T, and the transpose of a C-contiguous array is what it wants.
    right, right_transposed = (b.T, False) if b.flags.c_contiguous else (b, True)
    left, left_transposed = (a.T, False) if a.flags.c_contiguous else (a, True)
    result = gemm(1.0, right, left, 1.0, out.T, right_transposed, left_transposed, overwrite_c=True)
    assert result.base is out.base or np.shares_memory(result, out)
