"""Compiling the C++ kernels at first use, and finding out which instruction set the machine has.

The kernels have a plain C interface and know nothing of torch, so any compiler will do, in ten seconds to half a minute;
binding.cpp uses torch's stable ABI, which is as small. A library is kept under a name made of everything that it depends on. It
is written beside its place and moved there in one step; other processes that want it wait, where files can be locked.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from qpass.compute import changed
from qpass.errors import QpassError

_SOURCES = Path(__file__).parent
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")


@dataclass(frozen=True)
class ISA:
    """An instruction set: the features it needs, as the operating system names them, and what the compiler is told. `more`:
    (feature, flag) pairs that are used where they are there."""

    name: str
    needs: tuple[str, ...]
    flags: tuple[str, ...]
    more: tuple[tuple[str, str], ...] = ()


#: From the best to the one that every machine has.
ISAS = (
    ISA(
        "avx512-vnni",
        ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"),
        (*_AVX512, "-mavx512vnni"),
        (("avx512vbmi", "-mavx512vbmi"),),
    ),
    ISA("avx512", ("avx512f", "avx512bw", "avx512vl", "avx512dq"), _AVX512),
    ISA("avx2", ("avx2", "fma", "f16c"), ("-mavx2", "-mfma", "-mf16c")),
    ISA("portable", (), ()),
)
_FLAGS = ("-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-w")
#: Of the kernels: compiled side by side, the longest first.
_KERNELS = ("linear_int8.cpp", "linear_float.cpp", "kernels.cpp")


@dataclass(frozen=True)
class Kernels:
    """A loaded library. `openmp`: whether it uses the threads of torch; without, one thread."""

    isa: str
    path: Path
    compiler: str
    openmp: bool
    seconds: float
    library: ctypes.CDLL


@dataclass(frozen=True)
class Missing:
    """Why there are no kernels; the reference serves instead."""

    reason: str


@cache
def cpu_features() -> frozenset[str]:
    """What the processor and the operating system offer; empty where that is not known."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line.partition(":")[2] for line in text.splitlines() if line.lower().startswith(("flags", "features"))]
    return frozenset(lines[0].split()) if lines else frozenset()


@cache
def _best_isa() -> str:
    return available_isas()[0]


def available_isas() -> list[str]:
    """The instruction sets that this machine can run, the best first."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return [isa.name for isa in ISAS if not isa.needs or (x86 and cpu_features() >= set(isa.needs))]


def find_compiler() -> str | None:
    """$CXX, or the first of g++, clang++, c++ on the path."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return shutil.which(name)
    return None


def _folders() -> Iterator[Path]:
    """Where libraries are kept: the user's cache, or, if that can not be written, a folder of this process."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    yield Path(base) / "qpass"
    own = Path(tempfile.mkdtemp(prefix="qpass-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    yield own


def _run(command: list[str]) -> str | None:
    """What went wrong, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else (done.stderr or done.stdout).strip()[-500:] or f"exit {done.returncode}"


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    for text in (compiler, version, torch.__version__, platform.machine(), *flags):
        digest.update(text.encode() + b"\0")
    for source in sorted((*_SOURCES.glob("*.h"), *_SOURCES.glob("*.cpp"))):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]


def _compile(compiler: str, sources: Sequence[str], flags: tuple[str, ...], path: Path) -> str | None:
    """What went wrong, or None. Other processes that want the same library wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with suppress(OSError, NotImplementedError):  # of file systems that lock nothing
            held.enter_context(FileLock(path.with_suffix(".lock")))
        if path.exists():
            return None
        with tempfile.TemporaryDirectory(dir=path.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as at_once:
            objects = [f"{folder}/{source}.o" for source in sources]
            commands = [
                [compiler, str(_SOURCES / source), "-c", *flags, "-o", made]
                for source, made in zip(sources, objects, strict=True)
            ]
            # Libraries come after what needs them.
            linking = [compiler, *objects, *flags, "-o", f"{folder}/{path.name}"]
            error = next(filter(None, at_once.map(_run, commands)), None) or _run(linking)
            if error is None:
                os.replace(f"{folder}/{path.name}", path)
            return error


def compiled(
    name: str, sources: Sequence[str], compiler: str, choices: Sequence[tuple[str, ...]]
) -> tuple[Path, int, ctypes.CDLL] | str:
    """The library of some source files, from the cache or compiled now: its file, which of `choices` of flags it was compiled
    with (the first that works), and the library; or what went wrong."""
    problem = ""
    for folder in _folders():
        refused = 0
        for chosen, flags in enumerate(choices):
            path = folder / f"{name}-{_key(compiler, flags)}.so"
            try:
                error = None if path.exists() else _compile(compiler, sources, flags, path)
                if error is None:
                    return path, chosen, ctypes.CDLL(str(path))
                problem, refused = error, refused + 1
            except OSError as error:  # no place to write, or a library that does not load
                problem = str(error)
        if refused == len(choices):  # another folder would not help
            break
    return f"{compiler} failed: {problem}"


def build(isa: ISA, compiler: str) -> Kernels | Missing:
    """The kernels for `isa`; with OpenMP if the compiler has it."""
    start = time.perf_counter()
    plain = (*_FLAGS, *isa.flags, *(flag for feature, flag in isa.more if feature in cpu_features()))
    found = compiled(f"kernels-{isa.name}", _KERNELS, compiler, [(*plain, "-fopenmp"), plain])
    if isinstance(found, str):
        return Missing(found)
    path, chosen, library = found
    return Kernels(isa.name, path, compiler, chosen == 0, time.perf_counter() - start, library)


@cache
def binding() -> ctypes.CDLL | Missing:
    """binding.cpp: from now on operators on CPU tensors are called without Python. Or why not: then they are called as before."""
    compiler = find_compiler()
    if compiler is None:
        return Missing("no C++ compiler")
    include, libraries = (Path(torch.__file__).parent / name for name in ("include", "lib"))
    flags = (*_FLAGS, f"-I{include}", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10")
    try:
        found = compiled("binding", ["binding.cpp"], compiler, [flags])
    except (OSError, subprocess.SubprocessError) as error:
        return Missing(f"{compiler}: {error}")
    return Missing(found) if isinstance(found, str) else found[2]


REFERENCE = "reference"
_chosen: list[str] = []


@cache
def _load(name: str) -> Kernels | Missing:
    compiler = find_compiler()
    if compiler is None:
        return Missing("no C++ compiler: neither $CXX nor g++, clang++ or c++")
    try:
        return build(next(isa for isa in ISAS if isa.name == name), compiler)
    except (OSError, subprocess.SubprocessError) as error:  # no program, no temporary folder
        return Missing(f"{compiler}: {error}")


@cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"qpass: no CPU kernels ({reason}); quantized models run through the slow reference. "
        "Install a C++ compiler, and look at `qpass doctor`.",
        stacklevel=3,
    )


def kernels() -> Kernels | Missing:
    """The kernels in use. Built at the first call; if that fails it warns, once."""
    if _chosen and _chosen[-1] == REFERENCE:
        return Missing("the reference was asked for")
    found = _load(_chosen[-1] if _chosen else _best_isa())
    if isinstance(found, Missing):
        _warn(found.reason)
    return found


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Within it the kernels of another instruction set of this machine, or "reference": none. `QpassError` if it has no such."""
    if name not in (*available_isas(), REFERENCE):
        raise QpassError(f"this machine cannot run {name!r}; it can run {', '.join(available_isas())}")
    _chosen.append(name)
    changed()
    try:
        yield
    finally:
        _chosen.pop()
        changed()
