"""Compiles the simulated device's C++ once for each version of it, of torch, and of Python, and loads it."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

HERE, NAME = Path(__file__).parent, "twin_device"
SOURCES, HEADERS = ("device.cpp", "kernels.cpp"), ("device.h",)
FLAGS = (
    "-O1",
    "-fPIC",
    "-std=c++20",
    "-w",
    f"-DTORCH_EXTENSION_NAME={NAME}",
    f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
)


def load() -> ModuleType:
    """Returns the native module; raises RuntimeError with the compiler's output if it doesn't compile."""
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(_compiled()))
    spec = importlib.util.spec_from_file_location(NAME, loader.path, loader=loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _compiled() -> Path:
    """Returns the shared library in torch's folder for extensions. Processes that need it at the same time wait for one
    compiler."""
    parts = [*FLAGS, torch.__version__, sys.version, *((HERE / name).read_text() for name in (*SOURCES, *HEADERS))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    folder = Path(root) / f"{NAME}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{NAME}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # which ends with the process that holds it
        if not library.exists():
            _compile(library)
    return library


def _compile(library: Path) -> None:
    home = Path(torch.__file__).parent
    includes = [home / "include", home / "include/torch/csrc/api/include", Path(sysconfig.get_paths()["include"])]
    compiler, options = os.environ.get("CXX", "g++"), [*FLAGS, *(f"-I{folder}" for folder in includes)]
    objects = [library.with_name(Path(name).stem + ".o") for name in SOURCES]
    _run(*([compiler, *options, "-c", str(HERE / s), "-o", str(o)] for s, o in zip(SOURCES, objects, strict=True)))
    unfinished = library.with_suffix(".unfinished")
    libraries = [f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python"]
    _run([compiler, "-shared", *map(str, objects), "-o", str(unfinished), *libraries])
    unfinished.rename(library)


def _run(*commands: list[str]) -> None:
    """Runs commands in parallel."""
    started = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [process.communicate()[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(f"the twin's C++ does not compile:\n{output[-4000:]}")
