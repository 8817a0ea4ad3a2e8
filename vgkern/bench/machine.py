"""What the figures were measured on, and with which versions."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import vgkern
from vgkern.ops import _native

from .rivals import RIVALS


def machine(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load": round(os.getloadavg()[0], 2),  # at the start: others on the machine
        "isa": _native.status()["isa"],
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1)}
        found |= {"arch": 10 * gpu.major + gpu.minor, "cuda": torch.version.cuda}
    return found


def versions() -> dict[str, str]:
    """Of vgkern, with its commit where it runs from a checkout, and of everything it is held to."""
    found = {"vgkern": vgkern.__version__, "python": platform.python_version()}
    commit = git("rev-parse", "--short", "HEAD")
    if commit:
        changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        found["vgkern"] += f" ({commit}{changed})"
    for package in dict.fromkeys(["torch", "triton", "numpy", *(r.package for r in RIVALS)]):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def git(*arguments: str) -> str:
    """What git says in the folder of this package; empty outside a checkout of it."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.exists() else []:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", "unknown")
    if name == "unknown" and "cpu family" in fields:
        kind = fields.get("vendor_id", "")
        name = f"{kind} family {fields['cpu family']} model {fields.get('model', '?')}"
    return name if fields else platform.processor() or platform.machine()


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device) -> float:
    """Memory that can be had now."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("MemAvailable"):
            return 1024.0 * int(line.split()[1])
    return 0.5 * memory_bytes()
