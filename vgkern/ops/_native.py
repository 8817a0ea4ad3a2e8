"""Find, compile and load csrc once; caches the library or the error.

`csrc/*.cpp` becomes one shared library, kept in a private cache under a name that is the hash of
all that it was made from. Files named `isa_*.cpp` are compiled once per instruction set
(`-DVG_ISA=v4|v3|base`), the others once, for any CPU of this architecture; the library picks at run
time. Nothing is compiled, probed or started at import.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vgkern.ops import _compile
from vgkern.ops._compile import NativeError

_LOCK_SECONDS = 300.0
_mutex = threading.Lock()
_outcome: Path | NativeError | None = None  # the loaded library or why there is none


def _after_fork() -> None:
    global _mutex  # another thread of the parent may have held it
    _mutex = threading.Lock()
    if isinstance(_outcome, Path):
        # libgomp's threads are not forked: a parallel region would wait for them for ever, in
        # torch's operators as in ours. torch's DataLoader workers do the same.
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)


def load() -> None:
    """Load the native kernels, building them if need be; raises the same NativeError every time."""
    global _outcome
    if _outcome is None:
        with _mutex:
            if _outcome is None:
                try:
                    _outcome = _load()
                except NativeError as e:
                    _outcome = e
    if isinstance(_outcome, NativeError):
        raise NativeError(str(_outcome)) from None


def build(verbose: bool = False, force: bool = False) -> Path:
    """The path of the built library; compiles it if it is not in the cache, or always (`force`)."""
    if os.environ.get("VGKERN_NO_NATIVE", "0") not in ("", "0"):
        raise NativeError("switched off by VGKERN_NO_NATIVE; unset it to use them")
    if platform.system() != "Linux":
        raise NativeError(f"native kernels are built on Linux only, this is {platform.system()}")
    try:
        return _build(verbose, force)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        raise NativeError(
            f"cannot build the native kernels: {where}{e.strerror or e}; set VGKERN_CACHE to a "
            "directory that you own and can write"
        ) from e


def status() -> dict[str, Any]:
    """What `python -m vgkern doctor` shows; builds nothing."""
    found: dict[str, Any] = {
        "compiler": None,
        "ninja": _compile.find_ninja(),
        "cache": str(_cache_path()),
        "library": None,
        "built": False,
        "loaded": isinstance(_outcome, Path),
        "error": str(_outcome) if isinstance(_outcome, NativeError) else None,
        "isa": _compile.cpu_isa(),
    }
    try:
        compiler = _compile.find_compiler()
        found["compiler"] = compiler and f"{shlex.join(compiler.command)} ({compiler.version})"
        _check_cache(_cache_path(), create=False)
        library = _find_built(_cache_path(), _compile.source_key(_compile.SOURCES), compiler)
        found.update(library=library and str(library), built=library is not None)
    except (NativeError, OSError) as e:
        found["error"] = found["error"] or str(e)
    return found


def _load() -> Path:
    library = build()
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as e:
        raise NativeError(
            f"{library} was built but does not load into torch {torch.__version__}: {e}; "
            "remove it and run `python -m vgkern build`"
        ) from e
    return library


# --- the cache: a private directory of <name>.so, each with a <name>.json that has its hash


def _cache_path() -> Path:
    if own := os.environ.get("VGKERN_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "vgkern"


def _check_cache(cache: Path, create: bool) -> None:
    """Libraries are only ever loaded from a directory that nobody else can write."""
    if create:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            cache.mkdir(mode=0o700)
    try:
        found = cache.lstat()
    except FileNotFoundError:
        return
    wrong = None
    if stat.S_ISLNK(found.st_mode):
        wrong = "it is a symbolic link"
    elif not stat.S_ISDIR(found.st_mode):
        wrong = "it is not a directory"
    elif found.st_uid != os.geteuid():
        wrong = f"its owner is uid {found.st_uid}, you are uid {os.geteuid()}"
    elif found.st_mode & 0o022:
        wrong = f"its mode is {stat.S_IMODE(found.st_mode):04o}, others can write to it"
    if wrong:
        raise NativeError(
            f"the cache directory {cache} is refused: {wrong}; run `chmod 700` on it if it is "
            "yours, or set VGKERN_CACHE to a directory that only you can write"
        )


def _read_no_follow(path: Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as f:
        return f.read()


def _stamp(key: str) -> dict[str, str]:
    return {"key": key, "torch": torch.__version__, "machine": platform.machine()}


def _find_built(cache: Path, key: str, compiler: _compile.Compiler | None) -> Path | None:
    """The library in the cache whose stamp and bytes are as its builder left them, if any."""
    # A machine without a compiler takes what a compiler left here, whichever it was.
    names = [_library_name(key, compiler.version)] if compiler else []
    libraries = [cache / n for n in names] or sorted(cache.glob(f"vgkern-{key}-*.so"))
    return next((library for library in libraries if _intact(library, key)), None)


def _intact(library: Path, key: str) -> bool:
    try:
        manifest = json.loads(_read_no_follow(library.with_suffix(".json")))
        sha256 = hashlib.sha256(_read_no_follow(library)).hexdigest()
    except (OSError, ValueError):
        return False
    return bool(manifest == {**_stamp(key), "sha256": sha256})


def _keep(made: Path, library: Path, key: str) -> None:
    """Move a library that was made in a directory of the cache to its name there."""
    sha256 = hashlib.sha256(made.read_bytes()).hexdigest()
    manifest = made.with_suffix(".json")
    manifest.write_text(json.dumps({**_stamp(key), "sha256": sha256}))
    os.replace(made, library)
    os.replace(manifest, library.with_suffix(".json"))


def _library_name(key: str, version: str) -> str:
    return f"vgkern-{key}-{hashlib.sha256(version.encode()).hexdigest()[:8]}.so"


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One builder per cache. The kernel drops the lock of a builder that dies."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(cache / "lock", flags, 0o600)
    began, said = time.monotonic(), False
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - began
                if waited > _LOCK_SECONDS:
                    raise NativeError(
                        f"waited {waited:.0f} s for another process that builds the native "
                        f"kernels (it holds {cache / 'lock'}); end that process and try again"
                    ) from None
                if waited > 2 and not said:
                    said = True
                    _compile.say("waiting for another process that builds the native kernels ...")
                time.sleep(0.05)
        yield
    finally:
        # Not left to close(): a process forked meanwhile shares this descriptor and its lock.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


# --- building


def _build(verbose: bool, force: bool) -> Path:
    cache, compiler = _cache_path(), _compile.find_compiler()
    key = _compile.source_key(_compile.SOURCES)
    _check_cache(cache, create=False)
    if not force and (library := _find_built(cache, key, compiler)):
        return library  # also from a cache that cannot be written
    if compiler is None:
        raise NativeError(
            "no C++ compiler (looked for c++, g++, clang++); install g++ or set CXX, then run "
            "`python -m vgkern build`"
        )
    if (ninja := _compile.find_ninja()) is None:
        raise NativeError("ninja is missing; run `pip install ninja`")
    _check_cache(cache, create=True)
    with _locked(cache):
        if not force and (library := _find_built(cache, key, compiler)):
            return library  # another process built it meanwhile
        for left in cache.glob("tmp-*"):  # of a builder that was killed
            shutil.rmtree(left, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix="tmp-", dir=cache))
        try:
            # From a copy, so that an edit during the build cannot be taken for what was built.
            source, objects = work / "csrc", cache / "objects"
            source.mkdir()
            for path in _compile.source_files(_compile.SOURCES):
                shutil.copyfile(path, source / path.name)
            key = _compile.source_key(source)
            library = cache / _library_name(key, compiler.version)
            if force or library.exists():  # it failed its check: trust nothing of that build
                shutil.rmtree(objects, ignore_errors=True)
            objects.mkdir(mode=0o700, exist_ok=True)
            log = cache / "build.log"
            made = _compile.compile_library(source, work, objects, log, compiler, ninja, verbose)
            _keep(made, library, key)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _prune(cache)
    return library


def _prune(cache: Path) -> None:
    """Keep the eight newest libraries, and a month of objects."""
    libraries = sorted(cache.glob("vgkern-*.so"), key=lambda p: p.stat().st_mtime)
    old = [p for p in cache.glob("objects/*.o") if time.time() - p.stat().st_mtime > 30 * 86400]
    for path in old + [q for p in libraries[:-8] for q in (p, p.with_suffix(".json"))]:
        path.unlink(missing_ok=True)
