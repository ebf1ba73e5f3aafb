"""Build the native extension `spotspeed._native`; everything else is in pyproject.toml.

The CUDA sources are compiled by nvcc where it is found and left out where it is not.
SPOTSPEED_CUDA=0 leaves them out anyway, SPOTSPEED_CUDA=1 makes their absence an error, and
SPOTSPEED_CUDA_ARCHS ("80;90") replaces the list of GPU architectures.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc"
ABSENT = "csrc/device_absent.cpp"
DEFAULT_ARCHS = "80;90"
HOST_FLAGS = ["-O3", "-std=c++17", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread",
              "-Wno-maybe-uninitialized"]  # fmt: skip


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler and the directory that holds its static runtime."""

    nvcc: str
    library_dir: str


def find_cuda() -> Cuda | str:
    """The CUDA toolkit to build with, or the reason why there is none."""
    wanted = os.environ.get("SPOTSPEED_CUDA", "")
    if wanted == "0":
        return "SPOTSPEED_CUDA=0"
    found = _probe()
    if wanted == "1" and isinstance(found, str):
        raise SystemExit(f"SPOTSPEED_CUDA=1, but {found}")
    return found


def _probe() -> Cuda | str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")
    if nvcc is None:
        return f"there is no nvcc in {home}/bin" if home else "there is no nvcc on PATH"
    # A dry run prints where the toolkit really is, also when nvcc is a wrapper or a link.
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    )
    for line in dry.stderr.splitlines():
        if line.startswith("#$ LIBRARIES="):
            for flag in shlex.split(line.partition("=")[2]):
                directory = flag.removeprefix("-L")
                if Path(directory, "libcudart_static.a").exists():
                    return Cuda(nvcc, directory)
    return f"{nvcc} comes without libcudart_static.a"


class BuildNative(build_ext):
    """build_ext that hands the .cu sources to nvcc and links the CUDA runtime statically."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        cuda = find_cuda()
        if isinstance(cuda, str):
            print(f"spotspeed: building without CUDA kernels ({cuda})")
        else:
            print(f"spotspeed: building CUDA kernels with {cuda.nvcc}")
            ext.sources = [source for source in ext.sources if source != ABSENT]
            ext.extra_objects = [*ext.extra_objects, *self._compile_cuda(cuda)]
            # The static runtime loads libcuda when it is first used, so the module imports
            # on machines that have neither a GPU nor CUDA.
            ext.extra_link_args += [f"-L{cuda.library_dir}", "-lcudart_static", "-ldl", "-lrt"]
        super().build_extension(ext)

    def _compile_cuda(self, cuda: Cuda) -> list[str]:
        out = Path(self.build_temp, "csrc")
        out.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("SPOTSPEED_CUDA_ARCHS", DEFAULT_ARCHS).replace(",", ";").split(";")
        targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        # PTX of the newest lets later GPUs compile the kernels when they are first used.
        targets.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        objects = []
        for source in sorted(SOURCES.glob("*.cu")):
            target = out / f"{source.name}.o"
            command = [
                cuda.nvcc, "-c", str(source), "-o", str(target), "-O3", "-std=c++17", *targets,
                "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "-cudart", "static",
            ]  # fmt: skip
            self.announce(shlex.join(command), level=2)
            subprocess.run(command, check=True)
            objects.append(str(target))
        return objects


setup(
    ext_modules=[
        Pybind11Extension(
            "spotspeed._native",
            sorted(f"csrc/{path.name}" for path in SOURCES.glob("*.cpp")),
            depends=sorted(f"csrc/{path.name}" for path in SOURCES.glob("*.h"))
            + sorted(f"csrc/{path.name}" for path in SOURCES.glob("*.cu")),
            cxx_std=17,
            extra_compile_args=HOST_FLAGS,
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
