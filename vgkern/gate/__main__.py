"""`python -m vgkern.gate ARCH FILE`: rows of all Triton launches on one architecture, as JSON.

A process of its own for each architecture and version of Triton: see `table`.
"""

import json
import sys
from pathlib import Path

from vgkern.gate.launches import launches
from vgkern.gate.record import compile_launches

if __name__ == "__main__":
    arch, out = int(sys.argv[1]), Path(sys.argv[2])
    rows = compile_launches(launches(), arch, out.parent / "cubins")
    out.write_text(json.dumps([row.to_json() for row in rows]))
