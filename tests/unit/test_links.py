"""Links in the documentation lead somewhere, and its pages are short enough to be read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INDEX = ROOT / "docs" / "README.md"
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "patches").glob("*.md")),
)
MAX_WORDS = 1400  # five minutes
# These are looked things up in, not read.
LONG = {"log.md", "kits.md", "structured_measured.md"}
MAX_README_LINES = 110

_FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n?|\n)+")
_CODE = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """Markdown without code."""
    return _CODE.sub("code", _INDENTED.sub("\n", _FENCED.sub("", text)))


def targets(text: str) -> list[str]:
    """Where the links and pictures of a page lead."""
    return _LINK.findall(prose(text))


def slug(heading: str) -> str:
    """GitHub's anchor of a heading: lower case, without punctuation, hyphens for spaces."""
    shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")


@cache
def anchors(page: Path) -> frozenset[str]:
    """All anchors of a page; of equal headings, the second gets `-1`, and so on."""
    headings = re.findall(r"^#{1,6} +(.+?) *#*$", _FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    seen: Counter[str] = Counter()
    found = set()
    for name in map(slug, headings):
        found.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return frozenset(found)


def broken(page: Path) -> Iterator[str]:
    """The links of a page that lead nowhere."""
    for target in targets(page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and (file.suffix != ".md" or anchor not in anchors(file))):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    assert list(broken(page)) == []


def test_links_to_nowhere_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# The `--flag`, explained: 2.0\n\n## Twice\n\n## Twice\n\n"
        "[a](#the---flag-explained-20) [b](#twice-1) [c](page.md#twice) [d](https://example.org/x)\n"
        "[e](#twice-2) [f](absent.md) [![g](absent.png)](page.md)\n`[h](code.md)`\n\n    [i](code.md)\n\n"
        "```\n# [j](code.md)\n```\n"
    )
    assert list(broken(page)) == ["#twice-2", "absent.md"]


def test_the_index_names_every_page() -> None:
    named = {(INDEX.parent / target).resolve() for target in targets(INDEX.read_text(encoding="utf-8"))}
    assert set((ROOT / "docs").rglob("*.md")) - {INDEX} <= named


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_can_be_read_in_five_minutes(page: Path) -> None:
    num_words = len(page.read_text(encoding="utf-8").split())
    assert num_words <= MAX_WORDS or page.name in LONG


def test_the_readme_fits_on_three_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES
