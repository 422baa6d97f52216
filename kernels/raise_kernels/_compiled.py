"""The C sources of csrc/, each a shared library, compiled on the user's machine when it has a C compiler.

    cc -march=native -fPIC -shared ... csrc/<name>.c     ->  ~/.cache/raise_kernels/<name>-<key>.so

The key covers sources, compiler, flags and processor, so that a change of any of them compiles anew. Without
a compiler, with RAISE_COMPILED=0, or where compiling fails (with one warning), there is no library, and the
callers run their PyTorch code.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
SWITCH = "RAISE_COMPILED"
COMPILERS = ("cc", "gcc", "clang")
# No option may let the compiler forget infinities and NaN: both carry meaning.
FLAGS = ("-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-pthread")
# gemm.c says what is to be vector code; -O3 only takes longer to compile.
OPTIMISE = {"token_stats": "-O3", "gemm": "-O2"}
FOLLOWS = {"gemm": "token_stats"}  # who multiplies hidden states asks for their statistics next
# The first set that works; not every compiler knows its own processor.
TUNING: tuple[tuple[str, ...], ...] = (("-march=native",), ())
SECONDS = 120.0  # one compilation may take this long
_LOCKS = {name: threading.Lock() for name in OPTIMISE}  # no library is compiled twice at a time


def library(name: str) -> ctypes.CDLL | None:
    """The library of csrc/<name>.c, or None where the PyTorch code is to run. Compiles at the first call.

    Found in $CC, or as cc, gcc or clang. None: no compiler, RAISE_COMPILED=0 (read at every call), or a
    compilation that failed, which is announced by one RuntimeWarning a process.
    """
    return None if os.environ.get(SWITCH) == "0" else _loaded(name)


def _loaded(name: str) -> ctypes.CDLL | None:
    with _LOCKS[name]:
        return _load_once(name)


@functools.cache
def _load_once(name: str) -> ctypes.CDLL | None:
    compiler = find_compiler()
    if compiler is None:
        return None
    if name in FOLLOWS:
        threading.Thread(target=_prepare, args=(compiler, FOLLOWS[name]), daemon=True).start()
    try:
        return load(compiler, cache_folder(), name)
    except (OSError, subprocess.SubprocessError) as error:
        message = error.stderr.strip()[-2000:] if isinstance(error, subprocess.CalledProcessError) else error
    warnings.warn(
        f"raise_kernels could not compile {name}.c with {shlex.join(compiler)} and runs slower "
        f"PyTorch code on the CPU; set CC to another compiler, or {SWITCH}=0 to accept that: {message}",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _prepare(compiler: Sequence[str], name: str) -> None:
    """Compile into the cache folder; what goes wrong is for the one who asks for the library to say."""
    folder = cache_folder()
    with _LOCKS[name], contextlib.suppress(OSError, subprocess.SubprocessError):
        if folder is not None:
            load(compiler, folder, name)


def find_compiler() -> list[str] | None:
    """The command of the C compiler: $CC (which may hold options), else the first of `COMPILERS` here.

    None where there is none, and where the C library has no POSIX threads.
    """
    if os.name != "posix":
        return None
    named = shlex.split(os.environ.get("CC", ""))
    for command in ([named] if named else []) + [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    return None


def cache_folder() -> Path | None:
    """The private folder of compiled libraries, or None where there cannot be one.

    $XDG_CACHE_HOME/raise_kernels or ~/.cache/raise_kernels, mode 0700. A folder that others own or may write
    to is not trusted.
    """
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "raise_kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except (OSError, RuntimeError):
        return None
    if status.st_uid != os.getuid() or status.st_mode & 0o022 or not os.access(folder, os.W_OK | os.X_OK):
        return None
    return folder


def load(compiler: Sequence[str], folder: Path | None, name: str) -> ctypes.CDLL:
    """Load a library from the cache folder, compiled before if it is not there; None: from nowhere.

    Raises OSError or subprocess.SubprocessError where that fails.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="raise_kernels-") as private:
            return ctypes.CDLL(str(_build(compiler, Path(private), name, name)))
    key = _key(compiler, name)
    kept = folder / f"{key}.so"
    if not kept.exists():
        _build(compiler, folder, name, key)
    return ctypes.CDLL(str(kept))


def _key(compiler: Sequence[str], name: str) -> str:
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, check=True, timeout=SECONDS
    ).stdout
    digest = hashlib.sha256(repr((compiler, version, FLAGS, OPTIMISE[name], TUNING, _processor())).encode())
    for source in [SOURCES / f"{name}.c", *sorted(SOURCES.glob("*.h"))]:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return f"{name}-{digest.hexdigest()[:32]}"


def _processor() -> str:
    """What -march=native sees: two machines may share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    known = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(sorted({line for line in lines if line.startswith(known)}))


def _build(compiler: Sequence[str], folder: Path, name: str, key: str) -> Path:
    """Compile into the folder under another name first, so that no process loads half a file."""
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=folder) as private:
        draft = f"{private}/{key}.so"
        for last, tuning in enumerate(TUNING, 1 - len(TUNING)):
            command = [*compiler, *FLAGS, OPTIMISE[name], *tuning, "-shared", "-o", draft]
            command += [str(SOURCES / f"{name}.c"), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            if done.returncode == 0:
                break
            if last == 0:
                done.check_returncode()
        return Path(draft).replace(folder / f"{key}.so")
