"""Makes Triton's interpreter exact for bfloat16: alone, it truncates on conversion and multiplies bit patterns."""

import os

import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=os.environ.get("TRITON_INTERPRET") == "1")
def exact_bfloat16():
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def exact_convert(data, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return data.view(np.uint16).astype(np.uint32) << 16
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.asarray(data, np.float32).view(np.uint32)
            nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(data), 0x7FC0, nearest_even).astype(np.uint16)
        return convert(data, source, target, rounding)

    def exact_dot(self, a, b, accumulator, *options):
        def widen(x):
            if x.dtype.scalar != tl.bfloat16:
                return x
            return interpreter.TensorHandle(
                exact_convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32
            )

        return dot(self, widen(a), widen(b), accumulator, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", exact_convert)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", exact_dot)
        yield
