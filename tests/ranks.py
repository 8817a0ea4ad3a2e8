"""Ranks for a test: processes of this machine in one gloo group."""

import datetime
import time

import pytest
import torch
import torch.distributed as dist

LIMIT = 240  # seconds until ranks that wait for each other are ended


def join(rank, store, world):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=100),
    )  # fmt: skip


def run(worker, world, *arguments):
    """`worker(rank, *arguments)` in `world` processes; an exception or a hang fails the test."""
    started = torch.multiprocessing.spawn(worker, arguments, nprocs=world, join=False)
    end = time.monotonic() + LIMIT
    while not started.join(timeout=5):
        if time.monotonic() > end:
            for process in started.processes:
                process.kill()
            pytest.fail("the ranks hang")
