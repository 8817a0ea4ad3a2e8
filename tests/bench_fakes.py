"""A fake clock, and rows and reports that were never measured, for the tests of the benchmark."""

import dataclasses

import torch

from vgkern.bench import record
from vgkern.bench.work import BOTH, Work

CPU = torch.device("cpu")
RATES = {"copy": 1e10, "fp32": 1e11, "bf16": 5e10, "fp16": 1e10}
TINY = Work("linear_policy_loss", "tiny", "fp32", BOTH, 32, 8192, "given", 256, 512)


class FakeClock:
    """Every call takes what its entry of `costs` says; the same entry may change by round."""

    name = "fake"

    def __init__(self, costs):
        self.costs, self.time, self.order = costs, 0.0, []

    def now(self):
        return self.time

    def sample(self, runs, calls):
        name = runs[0]()
        self.order.append((name, calls))
        costs = self.costs[name]
        one = costs.pop(0) if len(costs) > 1 else costs[0]
        self.time += one * calls
        return one


def row(**changes) -> record.Row:
    fields = {**dataclasses.asdict(TINY), "variant": "vgkern cpu", "seconds": 0.01, "ratio": 1.0}
    fields |= {"noise": 0.01, "rounds": 5, "calls": 1, "clock": "wall", "flops": 8, "bytes": 4}
    return record.Row(**{**fields, **changes})


def report(rows, **changes) -> record.Report:
    machine = {"device": "cpu", "cpu": "a cpu", "threads": 2, "cores": 2, "load": 0.0}
    versions = {"vgkern": "1", "torch": "2"}
    return record.Report(machine, versions, dict(RATES), {"level": "quick"}, rows, **changes)
