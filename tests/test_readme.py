"""The README's Python runs as it stands, and its commands exist."""

import re
from pathlib import Path

import pytest

from fpdm.cli.main import make_parser
from fpdm.recipes import recipe
from fpdm.training.loop import Trainer

ROOT = Path(__file__).parents[1]
README, EXTEND = (ROOT / "README.md").read_text(), (ROOT / "docs/extend.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("text", [README, EXTEND], ids=["README.md", "extend.md"])
def test_the_parts(text):
    (code,) = [block for block in blocks("python", text) if "from_preset" in block]
    exec(compile(code, "docs", "exec"), {})


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKS = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^):]+)\)", page.read_text())]


@pytest.mark.parametrize(("page", "link"), LINKS, ids=lambda part: part.name if isinstance(part, Path) else part)
def test_links_within_the_repository_lead_somewhere(page, link):
    target, _, section = link.partition("#")
    there = page.parent / target if target else page
    assert there.exists()
    assert not section or section in sections(there.read_text())


def sections(text):
    """How the headings of a page are named in links."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_sampling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Trainer(recipe("digits").with_fields(steps=1, log_every=1), "runs/digits").run()
    (code,) = [block for block in blocks("python") if "from_pretrained" in block]
    exec(compile(code, "README.md", "exec"), {})
    assert Path("three.png").is_file()


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines() if "fpdm " in line])
def test_commands_parse(line):
    make_parser().parse_args(line.split("#")[0].split()[1:])
