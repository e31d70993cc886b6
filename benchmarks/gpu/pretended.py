"""A GPU that is not there: programs run as on an H100, launch their Triton kernels, and nothing is computed on it.

    with pretended_gpu(), collected_kernels() as kernels:
        program()
    for kernel in kernels:
        kernel.compile()

Numbers on the device are integers and floats. Integers are kept and computed with (labels and row indices steer a program);
floats are never made, as no kernel ever writes them: whatever a program reads of them on the host is 1. So a tile of any size
costs nothing, and a program of any size takes the way that it would take on the real device: its back-end, chunks, pitches,
alignments. What a launch is specialised on is all there. Not covered: any number that comes out of it.

Tests: tests/benchmarks/gpu/test_pack.py.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia_driver
from triton.backends.nvidia.driver import CudaLauncher, make_launcher, ty_to_cpp
from triton.compiler import ASTSource
from triton.runtime import driver

aten = torch.ops.aten
CAPABILITY = (9, 0)
DEVICE = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=85_017_624_576,
    warp_size=32,
    L2_cache_size=50 << 20,
)
TARGET = GPUTarget("cuda", 90, 32)
ADDRESS = 1 << 40  # where every allocation begins, as far as alignment goes


class GpuTensor(Tensor):
    """A tensor that says it is on the GPU; `known` is it on the CPU (integers) or without numbers (floats)."""

    @staticmethod
    def __new__(cls, known: Tensor):
        return Tensor._make_wrapper_subclass(
            cls,
            known.size(),
            strides=known.stride(),
            storage_offset=known.storage_offset(),
            dtype=known.dtype,
            device="meta",  # to C++, which may know no CUDA at all and would ask for guards and streams
        )

    def __init__(self, known: Tensor):
        self.known = known

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def data_ptr(self) -> int:
        return ADDRESS + self.storage_offset() * self.itemsize

    def __repr__(self, **_) -> str:
        return f"GpuTensor({self.dtype}, {tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


class _OnGpu(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


def _without_numbers(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _to_gpu(known: Tensor) -> GpuTensor:
    return GpuTensor(_without_numbers(known) if known.dtype.is_floating_point else known)


def _to_host(known: Tensor) -> Tensor:
    return torch.ones(known.shape, dtype=known.dtype) if known.is_meta else known.clone()


def _compute(function, args, kwargs):
    """One operator. What is on the GPU comes out as GpuTensor, and what is read of it on the host as the docstring tells."""
    if function.namespace == "longpo_ops":  # its Python body, whose own operators come here again
        with _OnGpu():
            return OPDEFS[function._schema.name]._init_fn(*args, **kwargs)
    name = function.overloadpacket
    if name is aten.is_pinned:  # all of the host's memory: then nobody asks the driver to pin it
        return True
    if function._can_decompose():  # outside of autograd, such an operator comes here before its parts
        with _OnGpu():
            return function.decompose(*args, **kwargs)
    on_gpu = any(isinstance(x, GpuTensor) for x in tree_flatten((args, kwargs))[0])
    target = kwargs.get("device")
    target = target and torch.device(target).type
    if target in ("cuda", "meta"):  # C++ asks for tensors on the device that it thinks those at hand are on
        return _make(function, args, kwargs)
    if not on_gpu:
        return function(*args, **kwargs | ({"pin_memory": False} if kwargs.get("pin_memory") else {}))
    if name is aten._local_scalar_dense:
        return _to_host(args[0].known).item()
    if name is aten.equal:
        return True
    if name is aten._to_copy and target == "cpu":
        return _to_host(args[0].known).to(kwargs.get("dtype"))
    if name is aten.copy_ and not isinstance(args[0], GpuTensor):
        return args[0].copy_(_to_host(args[1].known))
    return return_and_correct_aliasing(function, args, kwargs, _on_gpu(function, args, kwargs))


def _make(function, args, kwargs) -> GpuTensor:
    """What comes to be on the GPU: filled, drawn, or copied from the host."""
    args, kwargs = _known((args, kwargs))
    kwargs |= {name: None for name in ("generator", "pin_memory") if name in kwargs}
    if function.overloadpacket is not aten._to_copy:
        made = function(*args, **kwargs | {"device": "meta"})
        return _to_gpu(made if made.dtype.is_floating_point else function(*args, **kwargs | {"device": "cpu"}))
    dtype = kwargs.get("dtype") or args[0].dtype
    return _to_gpu((_without_numbers(args[0]) if dtype.is_floating_point else args[0]).to(dtype, copy=True))


def _on_gpu(function, args, kwargs):
    """An operator of tensors on the GPU; nothing, where it would change floats."""
    args, kwargs = _known((args, kwargs))
    if any(x.is_meta for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)):
        if any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments):
            return None
        args, kwargs = tree_map_only(Tensor, _without_numbers, (args, kwargs))
        kwargs |= {"device": "meta"} if "device" in kwargs else {}
    return tree_map_only(Tensor, _to_gpu, function(*args, **kwargs))


def _known(tree):
    return tree_map_only(GpuTensor, lambda x: x.known, tree)


class _Generator(torch.Generator):
    """Of the host, whatever device it is asked for."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class _Event:
    """A CUDA event; between two of them lies a second, so that nobody repeats for a longer time."""

    def __init__(self, **_):
        pass

    def record(self, *_) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end) -> float:
        return 1e3


def _nothing(*_, **__) -> None:
    pass


CUDA = {
    "is_available": lambda: True,
    "_lazy_init": _nothing,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_capability": lambda *_: CAPABILITY,
    "get_device_properties": lambda *_: PROPERTIES,
    "current_stream": lambda *_: SimpleNamespace(cuda_stream=0),
    "device": lambda *_: contextlib.nullcontext(),
    "Event": _Event,
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "mem_get_info": lambda *_: (PROPERTIES.total_memory, PROPERTIES.total_memory),
} | dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), _nothing)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """CUDA tensors of this process are pretended within. Programs name the device with its index: DEVICE."""
    make = torch.tensor

    def by_way_of_the_host(data, *, dtype=None, device=None, **_) -> Tensor:
        return make(data, dtype=dtype).to(device)

    with contextlib.ExitStack() as stack:
        for name, value in CUDA.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(torch, "tensor", by_way_of_the_host))
        stack.enter_context(mock.patch.object(driver, "_active", Driver()))
        stack.enter_context(_OnGpu())
        yield


# ---- Triton ----------------------------------------------------------------------------------------------------------


class _Launcher(CudaLauncher):
    """Compiled and loaded as Triton does it; launches nothing."""

    def __call__(self, *_) -> None:
        pass


class Driver:
    """What Triton's JIT asks of a driver, answered for an H100."""

    launcher_cls = _Launcher
    utils = SimpleNamespace(
        load_binary=lambda *_: (None, None, 0, 0, 1024),
        get_device_properties=lambda device: {"max_shared_mem": 232_448, "multiprocessor_count": 132, "warpSize": 32},
    )

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return ty_to_cpp(name)


class Kernel(NamedTuple):
    """What Triton compiles for a launch."""

    source: ASTSource
    target: GPUTarget
    options: dict

    @property
    def name(self) -> str:
        return self.source.fn.__name__

    def compile(self) -> None:
        """Into Triton's cache: the kernel, and the module that launches it (by way of gcc)."""
        compiled = triton.compile(*self)
        _Launcher(compiled.src, compiled.metadata)


class _Launchable:
    """In the place of a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *_) -> None:
        pass

    def run(self, *_) -> None:
        pass


@contextlib.contextmanager
def collected_kernels() -> Iterator[list[Kernel]]:
    """The kernels that a program launches within, each once; none is compiled. For kernels not launched before."""
    kernels: list[Kernel] = []

    def compile(source, target, options) -> _Launchable:
        kernels.append(Kernel(source, target, options))
        return _Launchable()

    with mock.patch.object(triton.compiler, "compile", compile):
        yield kernels


@functools.cache
def load_launchers() -> None:
    """Lets modules that launch kernels be compiled and loaded here, and loads Triton's own helpers.

    Triton links them with libcuda.so.1, which comes with a GPU's driver; where there is none, one whose functions do
    nothing stands in. Raises RuntimeError where gcc does not make it.
    """
    if not _has_libcuda():
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _stand_in_for_libcuda(folder)
    nvidia_driver.CudaUtils()


def _has_libcuda() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _stand_in_for_libcuda(folder: Path) -> None:
    text = (Path(nvidia_driver.__file__).parent / "driver.c").read_text() + make_launcher({}, {}, None)
    functions = sorted(set(re.findall(r"\bcu[A-Z]\w+", text)))
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in functions))
    words = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"gcc makes no stand-in for libcuda.so.1: {done.stderr.strip()}")
    knobs.nvidia.libcuda_path = str(folder)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # what names libcuda.so.1 finds this one, as it is loaded
