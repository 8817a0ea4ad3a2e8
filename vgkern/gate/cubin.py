"""Registers, local memory, shared memory and instructions of the kernels in a cubin.

Read with cuobjdump and nvdisasm, which come with Triton. What the tools do not say plainly:
- spilled registers are counted in STACK, as are arrays that could not be kept in registers, and
  LOCAL stays 0; STACK may also be reserved and not used. Only ptxas's own log tells them apart.
- from sm_90 on SHARED holds the 1 KiB that the system reserves.
- counts of instructions are static: the body of a loop counts once; padding is counted out.
- nvdisasm takes 0.4 s to start and no time to run: the code of many kernels goes to it at once.
"""

import bisect
import collections
import dataclasses
import functools
import hashlib
import importlib.util
import json
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vgkern.gate.arch import RESERVED

_TENSOR = re.compile(r"[HIQBD]GMMA|UTC\w*MMA|[HIQDO]MMA")  # wgmma, tcgen05, mma.sync
_COPIES = {"LDGSTS": "cp.async", "UTMALDG": "tma", "UTMASTG": "tma", "UBLKCP": "bulk"}
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[\w:]+)*)", re.M
)


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one kernel."""

    registers: int  # per thread
    stack: int  # bytes per thread of local memory that is used: spills and arrays
    shared: int  # bytes per block, static
    threads: int  # most per block, of __launch_bounds__; 0: not said
    tensor: dict[str, int]  # tensor-core instructions
    loads: dict[str, int]  # loads of global memory by their width in bits, cp.async, tma
    instructions: int


@functools.cache
def tool(name: str) -> str:
    """The path of a binary tool: Triton's own, else that of the CUDA toolkit."""
    spec = importlib.util.find_spec("triton")
    for place in spec.submodule_search_locations or () if spec else ():
        if (own := Path(place) / "backends" / "nvidia" / "bin" / name).exists():
            return str(own)
    if found := shutil.which(name):
        return found
    raise FileNotFoundError(f"{name}: neither in triton nor on the PATH; pip install triton")


def inspect(
    cubins: Sequence[bytes], arch: int, cache: Path | None = None
) -> list[dict[str, Resources]]:
    """{mangled name: Resources} of each; `cache`: a directory that keeps the answers by content."""
    own = Path(__file__).read_bytes()
    names = [hashlib.sha256(cubin + own).hexdigest()[:32] for cubin in cubins]
    found = {}
    for name in names:
        if cache and (kept := cache / f"{name}.json").exists():
            found[name] = {k: Resources(**v) for k, v in json.loads(kept.read_text()).items()}
    new = {name: cubin for name, cubin in zip(names, cubins, strict=True) if name not in found}
    for name, made in zip(new, _inspect(list(new.values()), arch), strict=True):
        found[name] = made
        if cache:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=cache, delete=False) as f:
                json.dump({k: dataclasses.asdict(v) for k, v in made.items()}, f)
            Path(f.name).replace(cache / f"{name}.json")
    return [found[name] for name in names]


def _inspect(cubins: list[bytes], arch: int) -> list[dict[str, Resources]]:
    found = []
    opcodes = iter(_opcodes([code for cubin in cubins for code in _code(cubin).values()], arch))
    for cubin in cubins:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(cubin)
            f.flush()
            usage = _run(tool("cuobjdump"), "-res-usage", f.name)
            bounds = _bounds(_run(tool("cuobjdump"), "-elf", f.name))
        bodies = {name: next(opcodes) for name in _code(cubin)}
        lines = re.findall(r"Function (\S+?):\s*\n\s*(.*)", usage)
        found.append({k: _resources(s, bodies[k], arch, bounds.get(k, 0)) for k, s in lines})
    return found


def _code(cubin: bytes) -> dict[str, bytes]:
    """{mangled name: machine code}: the sections .text.<name> of a 64-bit ELF file."""
    (at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    table = [struct.unpack_from("<II16xQQ", cubin, at + i * size) for i in range(count)]
    strings = table[names][2] if table else 0
    found = {}
    for name, _, start, length in table:
        text = cubin[strings + name : cubin.index(b"\0", strings + name)].decode()
        if text.startswith(".text."):
            found[text.removeprefix(".text.")] = cubin[start : start + length]
    return found


def _opcodes(codes: list[bytes], arch: int) -> list[list[str]]:
    """The instructions of each piece of machine code, NOPs included."""
    if not codes:
        return []
    with tempfile.NamedTemporaryFile(suffix=".bin") as f:
        f.write(b"".join(codes))
        f.flush()
        said = _run(tool("nvdisasm"), "-b", f"SM{arch}{'a' if arch >= 90 else ''}", f.name)
    lines = [(int(at, 16), opcode) for at, opcode in _INSTRUCTION.findall(said)]
    found, first, end = [], 0, 0
    for code in codes:
        end += len(code)
        last = bisect.bisect_left(lines, (end, ""), first)
        found.append([opcode for _, opcode in lines[first:last]])
        first = last
    return found


def _resources(line: str, opcodes: list[str], arch: int, threads: int) -> Resources:
    usage = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    tensor: collections.Counter[str] = collections.Counter()
    loads: collections.Counter[str] = collections.Counter()
    local, count = False, 0
    for opcode in opcodes:
        base, *parts = opcode.split(".")
        count += base != "NOP"
        if _TENSOR.fullmatch(base):
            tensor[base] += 1
        elif base in ("LDL", "STL"):
            local = True
        elif base == "LDG":
            widths = [p.removeprefix("U").removeprefix("S") for p in parts]
            loads[next((w for w in widths if w in ("256", "128", "64", "16", "8")), "32")] += 1
        elif base in _COPIES:
            loads[_COPIES[base]] += 1
    return Resources(
        registers=usage["REG"],
        stack=usage["STACK"] if local else 0,
        shared=max(0, usage["SHARED"] - (RESERVED if arch >= 90 else 0)),
        threads=threads,
        tensor=dict(tensor),
        loads=dict(loads),
        instructions=count,
    )


def spills(said: str) -> dict[str, int]:
    """{mangled name: bytes per thread} from the log of `ptxas -v`."""
    found = re.findall(r"properties for (\S+)\s.*? (\d+) bytes spill stores", said, flags=re.S)
    return {name: int(count) for name, count in found}


def _bounds(elf: str) -> dict[str, int]:
    """{kernel: threads} of what __launch_bounds__ left in the cubin."""
    sections = re.split(r"^\.nv\.info\.(\S+)\s*$", elf, flags=re.M)
    found = {}
    for name, text in zip(sections[1::2], sections[2::2], strict=True):
        m = re.search(r"EIATTR_(?:MAX_THREADS|REQNTID).*?Value:\s*((?:0x[0-9a-f]+ ?)+)", text, re.S)
        if m:
            x, y, z = (int(v, 16) for v in m.group(1).split())
            found[name] = x * y * z
    return found


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
