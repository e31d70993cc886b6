"""What is installed and under which names; the C++ back-end is compiled along the way where that is possible."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, find_namespace_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "longpo_ops/__init__.py").read_text("utf-8"), re.MULTILINE)[1]

TRAIN = ["accelerate>=1.1", "datasets", "matplotlib", "peft", "pyyaml", "typer"]
GENERATE = ["datasets", "html-to-markdown>=3.21,<4", "httpx", "matplotlib", "pypdfium2", "rich", "typer"]
OFFICE = ["markitdown[docx]"]
MEMORY = ["matplotlib", "rich", "torchao>=0.18", "typer"]
BENCH = ["cut-cross-entropy", "matplotlib", "psutil"]
TOOLS = ["hypothesis", "ninja", "pytest", "pytest-benchmark", "pytest-timeout", "pytest-xdist", "ruff", "trl"]


def prebuild(destination: Path) -> None:
    """Compile csrc/cpu into `destination`. No failure stops the install: the library then compiles at first use."""
    source = ROOT / "longpo_ops/ops/build.py"
    spec = importlib.util.spec_from_file_location("longpo_ops_build", source)  # by path: the package needs torch
    try:
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        destination.mkdir(parents=True, exist_ok=True)
        module.compile_cpu(destination)
        print(f"longpo_ops: the C++ CPU back-end is compiled in {destination}")
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"longpo_ops: the C++ CPU back-end is not prebuilt ({why}); it is compiled at first use instead")


class BuildPy(build_py):
    """Also puts the compiled CPU back-end into the package, and leaves out how the tiny model was made."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "pretrain"]

    def run(self) -> None:
        super().run()
        native = (ROOT if self.editable_mode else Path(self.build_lib)) / "longpo_ops/_native"
        shutil.rmtree(native, ignore_errors=True)  # may hold the library of an older source
        prebuild(native)


class PlatformDistribution(Distribution):
    """A wheel may hold a compiled file, so it is for one platform."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    name="longpo_ops",
    version=VERSION,
    description="Train language models on preferences at 128K to 512K tokens on few GPUs",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # longpo_ops/kernels, csrc and tiny are links to folders beside it: one path to them in a checkout, an editable install
    # and a wheel, and no top-level package `kernels`, which would shadow Hugging Face's.
    packages=find_namespace_packages(include=["longpo_ops*"], exclude=["*__pycache__*", "longpo_ops._native*"]),
    package_data={
        "longpo_ops.csrc.cpu": ["*.cpp", "*.h"],
        "longpo_ops.csrc.cuda": ["*.cu", "*.h"],
        "longpo_ops.evaluate": ["*.txt"],
        "longpo_ops.generate.prompts": ["*.txt"],
        "longpo_ops.generate.prompts.default": ["*.txt"],
        "longpo_ops.generate.prompts.official": ["*.txt"],
        "longpo_ops.memory.models": ["*.json"],
        "longpo_ops.tiny": ["*.yaml"],
        "longpo_ops.tiny.model": [
            "config.json",
            "generation_config.json",
            "tokenizer*.json",
            "*.jinja",
            "*.safetensors",
        ],
        "longpo_ops.tiny.prompts": ["*.txt"],
    },
    install_requires=[
        "einops",
        "numpy",
        "torch>=2.11,<2.14",
        "transformers>=5.0",
        "triton>=3.6; sys_platform == 'linux' and platform_machine == 'x86_64'",
    ],
    extras_require={
        "bench": BENCH,
        "evaluate": [*GENERATE, "lm-eval>=0.4.13", "pyyaml"],
        "dev": [*TOOLS, *BENCH, *GENERATE, *MEMORY, *TRAIN],
        "flash": ["flash-attn"],
        "memory": MEMORY,
        "generate": GENERATE,
        "office": OFFICE,
        "train": TRAIN,
        "vllm": ["vllm"],
    },
    entry_points={"console_scripts": ["longpo = longpo_ops.cli:main"]},
    cmdclass={"build_py": BuildPy},
    distclass=PlatformDistribution,
)
