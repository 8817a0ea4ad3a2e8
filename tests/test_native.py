"""The loader of the native kernels: concurrent, killed, corrupted and impossible builds."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vgkern.ops import _backend, _compile, _native

ISA_CPP = """
namespace VG_ISA { int width() { return sizeof(int) * __CHAR_BIT__; } }
"""
LIB_CPP = """
#include "tiny.h"
extern "C" __attribute__((visibility("default"))) int tiny() {
  int n = base::width();
#ifdef VG_HAVE_V4
  n += v4::width();
#endif
  return n;
}
"""
TINY_H = "namespace base { int width(); } namespace v4 { int width(); }\n"
needs_compiler = pytest.mark.skipif(_compile.find_compiler() is None, reason="no C++ compiler")


class Tiny:
    """A library of two files that compiles in a fraction of a second, by a compiler that counts."""

    def __init__(self, root: Path) -> None:
        self.source, self.cache, self.calls = root / "csrc", root / "cache", root / "calls"
        self.source.mkdir()
        for name, text in [("lib.cpp", LIB_CPP), ("isa_w.cpp", ISA_CPP), ("tiny.h", TINY_H)]:
            (self.source / name).write_text(text)

    def compiled(self) -> list[str]:
        """The sources compiled so far, in order."""
        return self.calls.read_text().split() if self.calls.exists() else []

    def forget(self) -> None:
        _native._outcome = None

    def library(self) -> Path:
        (library,) = self.cache.glob("*.so")
        return library


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    made = Tiny(tmp_path)
    wrapper = tmp_path / "counting-c++"
    compiler = _compile.find_compiler()
    real = compiler.command[0] if compiler else "c++"
    wrapper.write_text(
        f"""#!/bin/sh
case "$*" in *" -c "*)
  echo "$*" | sed "s/.* -c //;s/ .*//;s,.*/,," >> {made.calls}
  sleep "${{TINY_SLOW:-0}}"
esac
exec {real} "$@"
"""
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("VGKERN_CACHE", str(made.cache))
    monkeypatch.delenv("VGKERN_NO_NATIVE", raising=False)
    monkeypatch.setattr(_compile, "SOURCES", made.source)
    monkeypatch.setattr(_native, "_outcome", None)
    return made


def in_child(work: Callable[[], None]) -> int:
    """Fork, run `work`, leave with 0 if it returned."""
    if pid := os.fork():
        return pid
    try:
        os.setpgid(0, 0)
        work()
        os._exit(0)
    except BaseException as e:
        print(f"child: {e!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def wait_for(pid: int, seconds: float = 20) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the child was still there after {seconds} s")


@needs_compiler
def test_builds_once_and_loads_again_without_compiling(tiny, capfd):
    _native.load()
    assert capfd.readouterr().err.count("building native kernels") == 1
    first = tiny.compiled()
    tiny.forget()
    _native.load()
    assert tiny.compiled() == first and not capfd.readouterr().err
    variants = 3 if "v4" in _compile._variants() else 1
    assert sorted(first) == ["isa_w.cpp"] * variants + ["lib.cpp"]
    assert tiny.cache.stat().st_mode & 0o777 == 0o700
    assert not list(tiny.cache.glob("tmp-*"))
    status = _native.status()
    assert status["built"] and status["loaded"] and status["library"] == str(tiny.library())


@needs_compiler
def test_an_edit_recompiles_one_file_and_a_header_all(tiny):
    _native.build()
    first = tiny.compiled()
    (tiny.source / "lib.cpp").write_text(LIB_CPP + "// more\n")
    _native.build()
    assert tiny.compiled()[len(first) :] == ["lib.cpp"]
    (tiny.source / "tiny.h").write_text(TINY_H + "// more\n")
    _native.build()
    assert sorted(tiny.compiled()[len(first) + 1 :]) == sorted(first)


@needs_compiler
def test_j1_a_killed_builder_leaves_no_lock(tiny, monkeypatch):
    monkeypatch.setenv("TINY_SLOW", "30")
    builder = in_child(_native.load)
    deadline = time.monotonic() + 20
    while not tiny.compiled():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(builder, signal.SIGKILL)  # only the builder: its compilers live on for a while
    os.waitpid(builder, 0)
    monkeypatch.delenv("TINY_SLOW")
    began = time.monotonic()
    _native.load()
    assert time.monotonic() - began < 10
    assert not list(tiny.cache.glob("tmp-*"))
    os.killpg(builder, signal.SIGKILL)


@needs_compiler
def test_j2_eight_processes_compile_once(tiny):
    children = [in_child(_native.load) for _ in range(8)]
    assert [wait_for(pid) for pid in children] == [0] * 8
    assert tiny.compiled().count("lib.cpp") == 1


@needs_compiler
def test_threads_load_once(tiny):
    threads = [threading.Thread(target=_native.load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert isinstance(_native._outcome, Path) and tiny.compiled().count("lib.cpp") == 1


def test_j3_a_cache_that_others_can_write_is_refused(tiny):
    tiny.cache.mkdir()
    for mode in (0o777, 0o770, 0o702):
        tiny.cache.chmod(mode)
        with pytest.raises(_native.NativeError, match=f"mode is {mode:04o}.*chmod 700"):
            _native.build()
    assert not tiny.compiled() and not list(tiny.cache.iterdir())


def test_j3_a_symbolic_link_is_refused(tiny, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    tiny.cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(_native.NativeError, match="symbolic link"):
        _native.build()


def test_j3_a_cache_of_another_owner_is_refused(tiny, monkeypatch):
    tiny.cache.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(_native.NativeError, match=r"owner is uid \d+, you are uid \d+"):
        _native.build()


@needs_compiler
def test_j4_a_flipped_byte_is_rebuilt_not_loaded(tiny):
    good = _native.build().read_bytes()
    count = len(tiny.compiled())
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    tiny.library().write_bytes(bad)
    assert not _native.status()["built"]
    assert _native.build().read_bytes() != bytes(bad)
    assert len(tiny.compiled()) == 2 * count  # nothing of the corrupted build was used again
    _native.load()


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("VGKERN_", "XDG_", "CXX"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=kept | env, capture_output=True, text=True, timeout=60
    )


USE_TWICE = """
import torch, vgkern
for _ in range(2):
    vgkern.token_logprobs(torch.zeros(2, 3), torch.tensor([0, 1]))
"""


@pytest.mark.parametrize("missing", ["compiler", "home"])
def test_j5_without_compiler_or_home_torch_runs_and_says_so_once(tmp_path, missing):
    env = {"HOME": os.devnull}  # cannot be created below, by root either
    if missing == "compiler":
        env = {"HOME": str(tmp_path), "PATH": str(tmp_path)}
    done = run_python(USE_TWICE, **env)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "vgkern" in line]
    reason = "no C++ compiler" if missing == "compiler" else "set VGKERN_CACHE"
    assert len(said) == 1 and reason in said[0], done.stderr


def test_switched_off(tiny, monkeypatch):
    monkeypatch.setenv("VGKERN_NO_NATIVE", "1")
    with pytest.raises(_native.NativeError, match="VGKERN_NO_NATIVE"):
        _native.load()
    assert not tiny.cache.exists()


@needs_compiler
def test_r24_fork_after_use_does_not_hang(tiny):
    x = torch.randn(1 << 16)  # enough for torch to use its threads

    def use() -> None:
        x.exp()
        _native.load()

    before = torch.get_num_threads()
    _native.load()
    torch.set_num_threads(2)
    try:
        x.exp()
        assert wait_for(in_child(use), 10) == 0
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_r25_a_library_that_does_not_load_falls_back_with_one_warning(tiny, monkeypatch, caplog):
    library = _native.build()
    foreign = b"\x7fELF of another torch"
    library.write_bytes(foreign)
    manifest = json.loads(library.with_suffix(".json").read_text())
    manifest["sha256"] = _native.hashlib.sha256(foreign).hexdigest()
    library.with_suffix(".json").write_text(json.dumps(manifest))
    monkeypatch.setattr(_backend, "_said", set())
    monkeypatch.delenv("VGKERN_BACKEND", raising=False)
    for _ in range(2):
        assert _backend.choose(None, torch.device("cpu"), torch.float32) == "torch"
    (record,) = caplog.records
    assert "does not load" in record.getMessage() and str(library) in record.getMessage()


@needs_compiler
def test_r25_a_library_stamped_for_another_torch_is_rebuilt(tiny):
    library = _native.build()
    manifest = library.with_suffix(".json")
    stamp = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**stamp, "torch": "1.0.0"}))
    count = len(tiny.compiled())
    _native.load()
    assert len(tiny.compiled()) > count
    assert json.loads(manifest.read_text())["torch"] == torch.__version__


@needs_compiler
def test_a_compile_error_is_told_once_and_kept(tiny):
    (tiny.source / "lib.cpp").write_text("int broken( { return 1; }\n")
    with pytest.raises(_native.NativeError, match=r"csrc/lib\.cpp:1:(.|\n)*python -m vgkern build"):
        _native.load()
    count = len(tiny.compiled())
    (tiny.source / "lib.cpp").write_text(LIB_CPP)
    with pytest.raises(_native.NativeError, match=r"csrc/lib\.cpp:1:"):
        _native.load()
    assert len(tiny.compiled()) == count
    assert not list(tiny.cache.glob("*.so")) and not list(tiny.cache.glob("tmp-*"))


@needs_compiler
def test_a_builder_that_never_ends_is_named(tiny, monkeypatch):
    tiny.cache.mkdir(mode=0o700)
    monkeypatch.setattr(_native, "_LOCK_SECONDS", 0.2)
    with (
        _native._locked(tiny.cache),
        pytest.raises(_native.NativeError, match=r"waited .* another process"),
    ):
        _native.build()


@needs_compiler
def test_an_instruction_set_that_the_compiler_rejects_is_left_out(tiny, monkeypatch):
    variants = {"base": [], "v4": ["-march=x86-64-v99"]}
    monkeypatch.setattr(_compile, "_variants", lambda: variants)
    _native.load()
    assert sorted(tiny.compiled()) == ["isa_w.cpp", "lib.cpp"]


def test_a_compiler_asked_for_by_name_is_had_or_refused(tiny, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(_native.NativeError, match="CXX='no-such-compiler' does not run"):
        _native.build()


@needs_compiler
def test_without_a_compiler_an_earlier_build_is_used(tiny, monkeypatch, tmp_path):
    library = _native.build()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _native.build() == library
