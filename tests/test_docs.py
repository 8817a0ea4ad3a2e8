"""Every relative link and anchor of the README and of docs/ leads somewhere, no page is left out of
the site or of its index, and the site builds without a warning where its generator is installed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("**/*.md"))]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
SOURCES = ("*.md", "*.toml", "*.yml", "Makefile", "constraints.txt", "docs/**/*.md",
           "vgkern/**/*.py", "benchmarks/*.py", "examples/*", "tests/*.py")  # fmt: skip


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """Of the headings, as the site and GitHub make them."""
    titles = [re.sub(r"[`*]|\[|\]\(.*?\)", "", t) for t in re.findall(r"^#+ (.*)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


def dead(page: Path, text: str) -> list[str]:
    wrong = []
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(prose(target))):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert dead(page, prose(page)) == []


def test_a_dead_link_is_seen():
    page = ROOT / "README.md"
    assert dead(page, "[a](docs/none.md) [b](#none) [c](#two-commands)") == [
        "docs/none.md",
        "#none",
    ]


def test_every_page_is_in_the_site_and_in_its_index():
    site, index = (ROOT / "mkdocs.yml").read_text(), (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("**/*.md"):
        name = str(page.relative_to(ROOT / "docs"))
        assert f": {name}\n" in site, f"{name}: give it a line in mkdocs.yml"
        assert name.startswith("api/") or name == "index.md" or f"]({name})" in index, name


def test_nothing_says_to_install_from_an_index_that_has_it_not():
    asked = re.compile(r"pip install[^\n`]*\s['\"]?vgkern(?:\[|\b(?![./-]))")
    paths = {p for pattern in SOURCES for p in ROOT.glob(pattern)}
    assert len(paths) > 100
    assert [
        p.name for p in paths if p != Path(__file__) and asked.search(p.read_text("utf-8"))
    ] == []
    assert asked.search("pip install 'vgkern" + "[hf]'") and asked.search("pip install vgkern")


def test_the_site_builds_without_a_warning(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"the site's generator lacks {module}: pip install -e '.[docs]'")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "-d"]
    done = subprocess.run(
        [*build, str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ops = (tmp_path / "site" / "api" / "ops.html").read_text()
    assert "[V, H] dtype of hidden" in ops and "The fused loss" in ops  # signature, docstring
    for name in ("contributing", "changelog", "architecture"):
        assert (tmp_path / "site" / f"{name}.html").exists()
