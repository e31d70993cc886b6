"""The CUDA C++ back-end: csrc/cuda/row_epilogue.cu behind the tile interface (equations and contract: tiles.py).

    z (n, V) float32 on a CUDA device  ->  logps (n,), stats (n, 2), dz (n, V) float32 or 16-bit in z's memory

The library has a plain C interface (pointers, sizes, a stream): no torch headers, one library for every torch. nvcc
compiles it at first use for sm_80 and its relatives, sm_90a and sm_100a, with PTX for what comes later. Divergences
are left to the Triton form, which visits both tiles in one kernel, or to the PyTorch form where there is no triton.
Scratch: V numbers for a bias that is not float32, n for segment sums; one launch per call.

Tests: tests/kernels/test_cuda_source.py.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import sysconfig
from contextlib import contextmanager
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from .build import BuildError, cached_library, source_folder
from .sparse import keep_columns_, sparse_gradient
from .tiles import NOTHING, LogitMap, Tiles, TorchTiles, _narrow

TARGETS = {"compute_80": ["sm_80", "compute_80"], "compute_90a": ["sm_90a"], "compute_100a": ["sm_100a"]}
USUAL_PLACE = Path("/usr/local/cuda/bin/nvcc")
PACKAGES = [f"nvidia-{name}" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# z n V pitch labels bias scale softcap
TILE = [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_double, c_double]
SIGNATURES = {
    "longpo_logps": [*TILE, c_void_p, c_void_p, c_void_p],  # logps stats stream
    "longpo_beside": [*TILE, c_void_p, c_void_p, c_void_p, c_void_p],  # logps stats classes stream
    "longpo_gradient": [*TILE, c_void_p, c_int, c_void_p, c_int, c_void_p],  # stats columns g dtype stream
    "longpo_affine": [
        *TILE,
        c_void_p,
        c_int,
        c_void_p,
        c_void_p,
        c_int,
        c_void_p,
    ],  # stats columns g classes dtype stream
    "longpo_logps_gradient": [*TILE, c_void_p, c_void_p, c_int, c_void_p],  # g logps dtype stream
    "longpo_segment_sums": [c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p],  # values segments n out K stream
}


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME or CUDA_PATH, of PATH, of the usual place, or of the pip packages (nvidia/cu13/bin)."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [home / "bin" / "nvcc" for home in homes]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(USUAL_PLACE)
    candidates += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/nvcc"), reverse=True)
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


@functools.cache
def load_cuda() -> ctypes.CDLL:
    """The library, compiled where no earlier process did so. Raises BuildError when there is no nvcc or it fails."""
    nvcc = find_nvcc()  # a library that is there needs none
    folder = source_folder("cuda")
    command = [str(nvcc or "nvcc"), "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC"]
    command += [f"-gencode=arch={virtual},code=[{','.join(real)}]" for virtual, real in TARGETS.items()]
    if (
        nvcc and (library := nvcc.parents[1] / "lib").is_dir()
    ):  # where the pip packages keep the runtime; others use lib64
        command.append(f"-L{library}")
    try:
        return bind(cached_library("cuda", [folder / "row_epilogue.cu", folder / "row_math.h"], command))
    except BuildError as error:
        if nvcc:
            raise
        how = "set CUDA_HOME, put nvcc on PATH, or pip install " + " ".join(PACKAGES)
        raise BuildError(f"no nvcc: {how}") from error


def bind(path: Path) -> ctypes.CDLL:
    """The library with its argument types declared: ctypes would cut 64-bit pointers to 32 bits otherwise."""
    library = ctypes.CDLL(str(path))
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = c_int
    library.longpo_error_string.argtypes, library.longpo_error_string.restype = [c_int], c_char_p
    return library


class CudaTiles:
    """Rows by hand-written CUDA. Raises BuildError where nothing can be compiled, RuntimeError when a launch fails."""

    name = "cuda"
    linear_logps = None

    def __init__(self, library: ctypes.CDLL | None = None):
        self._library = library or load_cuda()

    def logps(self, z, labels, map, beside=NOTHING):
        logps, stats = z.new_empty(z.shape[0]), z.new_empty(z.shape[0], beside.columns)
        if beside.columns == 2:
            self._rows("longpo_logps", z, labels, map, logps.data_ptr(), stats.data_ptr())
        else:
            classes = _classes(beside.classes, z)
            self._rows("longpo_beside", z, labels, map, logps.data_ptr(), stats.data_ptr(), _pointer(classes))
        return logps, stats

    def gradient_(self, z, labels, stats, g, map, dtype, classes=None):
        stats, g, classes = stats.contiguous(), g.contiguous(), _classes(classes, z)
        known = stats.data_ptr(), stats.shape[1], g.data_ptr()
        if g.dim() == 1:
            self._rows("longpo_gradient", z, labels, map, *known, DTYPES[dtype])
        else:
            assert g.shape == (z.shape[0], 4)
            self._rows("longpo_affine", z, labels, map, *known, _pointer(classes), DTYPES[dtype])
        return _narrow(z, dtype)

    def logps_gradient_(self, z, labels, g, map, dtype):
        logps, g = z.new_empty(z.shape[0]), g.contiguous()
        self._rows("longpo_logps_gradient", z, labels, map, g.data_ptr(), logps.data_ptr(), DTYPES[dtype])
        return logps, _narrow(z, dtype)

    @staticmethod
    def divergence_tiles() -> Tiles:
        return _divergence_tiles()

    def divergence_(self, *arguments):
        return _divergence_tiles().divergence_(*arguments)

    def sparse_gradient(self, dz, products, rule):
        return sparse_gradient(dz, products, keep_columns_)

    def segment_sums(self, values, segments, out):
        values, segments = values.double().contiguous(), segments.contiguous()
        assert out.dtype == torch.float64 and out.is_contiguous() and segments.dtype == torch.int64
        self._call(
            "longpo_segment_sums",
            out.device,
            *(values.data_ptr(), segments.data_ptr(), values.shape[0], out.data_ptr(), out.shape[0]),
        )

    def _rows(self, function: str, z: Tensor, labels: Tensor, map: LogitMap, *rest) -> None:
        n, vocab = z.shape
        assert z.dtype == torch.float32 and (vocab == 1 or z.stride(1) == 1) and labels.dtype == torch.int64
        pitch = z.stride(0) if n > 1 else vocab
        labels = labels.contiguous()
        bias = None if map.bias is None else map.bias.to(torch.float32).contiguous()
        tile = (z.data_ptr(), n, vocab, pitch, labels.data_ptr(), _pointer(bias))
        self._call(function, z.device, *tile, map.scale, map.softcap, *rest)

    def _call(self, function: str, device: torch.device, *arguments) -> None:
        with self._stream(device) as stream:
            error = getattr(self._library, function)(*arguments, stream)
        if error:
            raise RuntimeError(f"{function} on {device}: {self._library.longpo_error_string(error).decode()}")

    @contextmanager
    def _stream(self, device: torch.device):
        """The device is current meanwhile: a launch goes to the current device, whatever its pointers belong to."""
        with torch.cuda.device(device):
            yield torch.cuda.current_stream(device).cuda_stream


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _classes(classes: Tensor | None, z: Tensor) -> Tensor | None:
    assert classes is None or (classes.dtype == torch.float32 and classes.shape == (z.shape[1],))
    return None if classes is None else classes.contiguous()


@functools.cache
def _divergence_tiles():
    try:
        from longpo_ops.kernels.tiles import TritonTiles
    except ImportError:
        return TorchTiles()
    return TritonTiles()
