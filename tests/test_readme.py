"""Every Python block of the README and of docs/ runs as it stands, and every file named exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.name}-{i}")
    for page in PAGES
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]
NAMED = r"(?:docs|examples|vgkern|benchmarks|tests|kernels|csrc)/[\w/]+\.\w+"


OTHERS = ("transformers", "trl", "verl")  # frameworks that a block may be about


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs(code: str) -> None:
    for name in OTHERS:
        if re.search(rf"^(?:import|from) {name}\b", code, re.M):
            pytest.importorskip(name, reason=f"{name}, which the block is about, is not installed")
    exec(compile(code, "a page", "exec"), {})


def test_there_are_blocks() -> None:
    assert BLOCKS


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(NAMED, page.read_text())
    assert named or page.name != "README.md"
    assert [name for name in named if not (ROOT / name).exists()] == []
