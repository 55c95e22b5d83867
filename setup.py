"""Package of megads. PyTorch comes first (see README): a looser request would pull a CUDA build onto a laptop.

The CUDA kernels of `csrc/` are built where nvcc and torch's headers are found, on a machine without a GPU too:

    python setup.py build_ext --inplace     csrc/*.{cu,cpp} -> megads/ops/_csrc.so     MEGADS_CUDA=0 leaves them out

Otherwise one line says why not, and megads runs on torch's own kernels.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

VERSION = next(
    line.split('"')[1]
    for line in Path("megads/__init__.py").read_text().splitlines()
    if "__version__" in line
)
SOURCES = ("csrc/norm.cu", "csrc/bindings.cpp")
LIBRARY = Path("megads/ops/_csrc.so")
# machine code for A100 and H100, and PTX that the driver compiles for what comes after
TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]")
TORCH_ABI = "0x020b000000000000"  # stable ABI of torch 2.11


def find_nvcc():
    """Path of the CUDA compiler, or None."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return shutil.which("nvcc") or next(
        filter(None, (shutil.which("nvcc", path=f"{h}/bin") for h in homes if h)), None
    )


def find_torch():
    """Folder of torch with the headers of the stable ABI, or None; torch is not imported."""
    spec = find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    return folder if folder and (folder / "include/torch/csrc/stable/library.h").is_file() else None


class BuildKernels(build_ext):
    """Runs nvcc itself: torch's own builder wants a GPU build of torch."""

    def run(self):
        nvcc, torch = find_nvcc(), find_torch()
        if os.environ.get("MEGADS_CUDA") == "0":
            return self._skip("MEGADS_CUDA=0")
        if nvcc is None:
            return self._skip("nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda")
        if torch is None:
            return self._skip(
                "torch >= 2.11 and its headers were not found; python setup.py build_ext --inplace builds them later"
            )
        target = self._target()
        inputs = [Path("setup.py"), *Path("csrc").rglob("*.*")]
        if (
            not self.force
            and target.is_file()
            and target.stat().st_mtime > max(p.stat().st_mtime for p in inputs)
        ):
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [
            nvcc,
            "-std=c++17",
            "-O3",
            "--threads",
            "0",
            "-shared",
            "-cudart",
            "static",
            "-Xcompiler",
            "-fPIC",
        ]
        command += [f"-gencode={wanted}" for wanted in TARGETS]
        command += [f"-DTORCH_TARGET_VERSION={TORCH_ABI}", "-DUSE_CUDA", f"-I{torch / 'include'}"]
        command += [
            *SOURCES,
            f"-L{torch / 'lib'}",
            "-Xlinker",
            "--no-as-needed",
            "-ltorch",
            "-ltorch_cpu",
            "-o",
            str(target),
        ]
        print(" ".join(command), flush=True)
        if subprocess.run(command).returncode == 0:
            return None
        if "build_ext" in sys.argv:
            raise SystemExit("megads: nvcc failed")
        return self._skip("nvcc failed")

    def _target(self):
        is_in_place = self.inplace or getattr(self, "editable_mode", False)
        return LIBRARY if is_in_place else Path(self.build_lib) / LIBRARY

    def _skip(self, reason):
        print(f"megads: CUDA kernels are not built: {reason}", file=sys.stderr, flush=True)

    def get_outputs(self):
        return [str(self._target())] if self._target().is_file() else []

    def get_output_mapping(self):
        return {}


EXTRAS = (
    ("fast", ("gigatoken>=0.10,<0.11",)),
    ("hf", ("safetensors>=0.4", "transformers>=5")),
    ("tensorboard", ("tensorboard>=2.16",)),
    ("mpi", ("mpi4py>=4", "mpich>=4")),
    ("deepspeed", ("deepspeed>=0.19.8,<0.20", "ninja")),
)
TESTS = ("pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6", "ruff>=0.8", "mypy>=1.11")

setup(
    name="megads",
    version=VERSION,
    description="A Megatron-style trainer for large language models",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["megads", "megads.*"]),
    package_data={"megads": ["py.typed"]},
    ext_modules=[Extension("megads.ops._csrc", list(SOURCES))] if find_nvcc() else [],
    cmdclass={"build_ext": BuildKernels},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pydantic>=2.7",
        "ruamel.yaml>=0.18",
        "rich>=13",
        "blake3>=1.0",
        "tokenizers>=0.20",
        "sentencepiece>=0.2",
        "pyarrow>=21",
    ],
    extras_require={
        **{name: list(needs) for name, needs in EXTRAS},
        "dev": [*TESTS, *(need for _, needs in EXTRAS for need in needs)],
    },
)
