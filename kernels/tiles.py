"""The Triton back-end: the Tiles interface (longpo_ops/ops/tiles.py) over the launchers of this folder.

Products of hidden states and head are not among them: longpo_ops/ops/products.py.

Tests: tests/kernels/test_interpreter.py, tests/kernels/test_sparse.py, tests/kernels/test_compile.py.
"""

from longpo_ops.kernels import divergence, linear_logps, row_epilogue, scaled_exps, segment_sums, sparse


class TritonTiles:
    """Float32 tiles on CUDA devices of sm_80 and newer (on the CPU where Triton interprets)."""

    name = "triton"
    logps = staticmethod(row_epilogue.logps)
    gradient_ = staticmethod(row_epilogue.gradient_)
    logps_gradient_ = staticmethod(row_epilogue.logps_gradient_)
    divergence_ = staticmethod(divergence.divergence_)
    segment_sums = staticmethod(segment_sums.segment_sums)
    linear_logps = staticmethod(linear_logps.linear_logps)
    sparse_gradient = staticmethod(sparse.sparse_gradient)
    scaled_exps = None


class ScaledTiles(TritonTiles):
    """The same with bfloat16 exponentials in place of a tile whose log-probs and their gradients are all that is asked for."""

    name = "scaled"
    scaled_exps = staticmethod(scaled_exps.scaled_exps)
