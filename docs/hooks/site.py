"""The pages of the site that lie at the root of the repository."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]


def on_files(files: Files, config: Any) -> Files:
    """CONTRIBUTING.md and CHANGELOG.md as pages beside those of docs/."""
    for name in ("CONTRIBUTING", "CHANGELOG"):
        text = (ROOT / f"{name}.md").read_text().replace("](docs/", "](")
        text = text.replace("](CHANGELOG.md", "](changelog.md")
        files.append(File.generated(config, f"{name.lower()}.md", content=text))
    return files
