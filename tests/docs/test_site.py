"""The settings of the site: nothing comes from elsewhere, search works without a server, a dead link is an error.

`make docs` builds the whole site; here it is a small one, with the settings of the large one.
"""

import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("myst_nb")
DOCS = ROOT / "docs"


def built(folder, **pages):
    source = folder / "docs"
    source.mkdir()
    shutil.copy(DOCS / "conf.py", source)
    shutil.copytree(DOCS / "_static", source / "_static")
    for name, text in pages.items():
        (source / f"{name}.md").write_text(text)
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", "site"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False), folder / "site"


TREE = "\n```{toctree}\nother\n```\n"


def test_nothing_comes_from_elsewhere_and_search_needs_no_server(tmp_path):
    page = "# One\n\n| a | b |\n| --- | --- |\n| [there](other.md#a-place) | `code` |\n" + TREE
    done, site = built(tmp_path, index=page, other="# Other\n\n## A place\n\nword\n")
    assert done.returncode == 0, done.stdout + done.stderr
    for path in site.rglob("*.html"):
        resources = re.findall(r"<(?:script|link|img)\b[^>]*?(?:src|href)=\"([^\"]+)\"", path.read_text())
        assert resources
        assert not [found for found in resources if "//" in found], path
    for path in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import\s+)[\"']?(?:https?:)?//", path.read_text()), path
    assert "word" in (site / "searchindex.js").read_text()
    assert 'href="other.html#a-place"' in (site / "index.html").read_text()


def test_a_link_that_leads_nowhere_is_an_error(tmp_path):
    links = ["missing.md", "other.md#no-place", "#nowhere"]
    text = "# One\n\n" + "\n\n".join(f"[dead]({link})" for link in links) + "\n" + TREE
    done, _ = built(tmp_path, index=text, other="# Other\n\n## A place\n")
    assert done.returncode == 1
    for link in links:
        assert link.split("#")[-1] in done.stderr


def test_ci_builds_the_site():
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^test:.*\bdocs\b", makefile, re.MULTILINE)
    assert re.search(r"^docs:.*\n\t.*-W --keep-going", makefile, re.MULTILINE)


def test_every_page_is_in_a_table_of_contents():
    """Sphinx says so as well, but names are seen here without a build."""
    listed = {"index"}
    for path in DOCS.rglob("*.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", path.read_text(), re.DOTALL):
            names = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {(path.parent / name).resolve().relative_to(DOCS).as_posix() for name in names}
    assert listed == {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")}
