"""Every relative link of a page leads to a file, and every #anchor to a heading."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them."""
    found = set()
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            text = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower())
            found.add(text.replace(" ", "-"))
    return found


def broken(page: Path) -> list[str]:
    wrong = []
    for link in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else page.parent / path
        named = not anchor or target.suffix != ".md"
        if not (target.exists() and (named or anchor in anchors(target))):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    assert not broken(page)


def test_a_link_that_leads_nowhere_is_seen(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# One two\n[a](a.md#one-two) [b](b.md) [c](#three) [d](https://x.y)\n")
    assert broken(page) == ["b.md", "#three"]


def test_every_page_is_in_the_sites_table_of_contents():
    nav = (ROOT / "mkdocs.yml").read_text()
    assert not [p.name for p in (ROOT / "docs").glob("*.md") if p.name not in nav]
