"""README.md and docs/: their Python runs, and their links lead somewhere."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NOT_RUN = "# not run"

# For README.md, which shows sizes worth timing: what to put in the place of what, so that it is quick.
SMALLER = {"README.md": [("torch.randn(8, 64, 56, 56,", "torch.randn(1, 64, 8, 8,")]}


def blocks(page):
    """The Python of a page that is to run, each block with the line it starts in."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        language, code = match.groups()
        if language == "python" and not code.startswith(NOT_RUN):
            yield text.count("\n", 0, match.start()) + 2, code


def anchors(page):
    """What one may write behind the # of a link to a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python(page):
    namespace = {"__name__": page.stem}
    torch.manual_seed(0)
    replacements = SMALLER.get(page.name, [])
    found = "".join(code for _, code in blocks(page))
    assert all(old in found for old, _ in replacements)
    with redirect_stdout(io.StringIO()):
        for line, code in blocks(page):
            for old, new in replacements:
                code = code.replace(old, new)
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_navigation_names_every_page():
    named = re.findall(r"[\w.]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(named) == [page.name for page in PAGES[1:]]


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_lines_are_short(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
