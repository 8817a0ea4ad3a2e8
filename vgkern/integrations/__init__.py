"""vgkern inside loops that people already have: TRL, verl, prime-rl, transformers.

Each module is a leaf: nothing in vgkern imports it, and it imports its framework when it is used.
Before anything of another library is replaced, its signature is compared with the one that the
drop-in was written against; a difference raises `IntegrationError`. Examples: docs/drop-ins.md.
"""

from vgkern.integrations._patch import IntegrationError, Patch

__all__ = ["IntegrationError", "Patch"]
