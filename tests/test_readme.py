"""Every Python block of the README and of docs/ runs as it stands and prints what the page says it
prints, and every file named exists. A ```text block that follows a Python block is its output."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n(?:It prints\n\n)?```text\n(.*?)```)?", re.S)
BLOCKS = [
    pytest.param(code, printed, id=f"{page.name}-{i}")
    for page in PAGES
    for i, (code, printed) in enumerate(BLOCK.findall(page.read_text()))
]
NAMED = r"(?:docs|examples|vgkern|benchmarks|tests|kernels|csrc)/[\w/]+\.\w+"


OTHERS = ("transformers", "trl", "verl")  # frameworks that a block may be about


@pytest.mark.parametrize(("code", "printed"), BLOCKS)
def test_block_runs(code: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in OTHERS:
        if re.search(rf"^(?:import|from) {name}\b", code, re.M):
            pytest.importorskip(name, reason=f"{name}, which the block is about, is not installed")
    exec(compile(code, "a page", "exec"), {})
    if printed:
        assert capsys.readouterr().out == printed


def test_there_are_blocks_and_the_readme_shows_what_its_block_prints() -> None:
    assert BLOCKS
    ((_, printed),) = BLOCK.findall((ROOT / "README.md").read_text())
    assert len(printed.splitlines()) > 2


def test_the_readme_is_read_in_three_minutes() -> None:
    text = (ROOT / "README.md").read_text()
    prose = re.sub(r"```.*?```|^\|.*?$|\(.*?\)|<!--.*?-->", "", text, flags=re.S | re.M)
    assert len(text.splitlines()) <= 130 and len(prose.split()) <= 500, len(prose.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(NAMED, page.read_text())
    assert named or page.name != "README.md"
    assert [name for name in named if not (ROOT / name).exists()] == []
