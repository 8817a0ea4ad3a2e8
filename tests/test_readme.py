"""Every Python block of the README runs as it stands."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs(code: str) -> None:
    exec(compile(code, str(README), "exec"), {})


def test_there_are_blocks() -> None:
    assert BLOCKS


def test_files_named_in_the_readme_exist() -> None:
    root = README.parent
    named = re.findall(r"(?:docs|examples|vgkern|benchmarks|tests)/[\w/]+\.\w+", README.read_text())
    assert named
    assert [name for name in named if not (root / name).exists()] == []
