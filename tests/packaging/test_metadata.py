"""What a release would upload: metadata, the page of the package index, the source distribution, the citation."""

from __future__ import annotations

import email
import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest
import yaml

from tests.conftest import ROOT
from tests.packaging.packages import run

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def hook():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TEXT = """\
[one](docs/a.md#b), [two](https://host/c), [three](#part), `x[i](y)`
![picture](docs/p.png) <img src="docs/q.png"> [![badge](docs/r.svg)](docs/s.md)

```python
table[0](docs/a.md)
```
"""


def test_without_an_address_links_are_their_texts_and_pictures_are_left_out():
    found = hook().for_index(TEXT)
    assert found.startswith("one, [two](https://host/c), [three](#part)")
    assert "table[0](docs/a.md)" in found
    before_code = found.partition("```")[0]
    assert "docs/" not in before_code and "<img" not in before_code


def test_with_an_address_links_lead_there():
    found = hook().for_index(TEXT, files="https://host/blob/main", pictures="https://host/raw/main")
    assert "[one](https://host/blob/main/docs/a.md#b), [two](https://host/c), [three](#part)" in found
    assert "![picture](https://host/raw/main/docs/p.png)" in found
    assert "table[0](docs/a.md)" in found


def test_the_readme_keeps_its_text():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = hook().for_index(readme)
    prose = re.sub(r"^```.*?^```$", "", found, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"\]\((?!https?://|#)", prose)
    assert [line for line in readme.splitlines() if line.startswith("#")] == [
        line for line in found.splitlines() if line.startswith("#")
    ]
    assert readme.count("```") == found.count("```")


def test_citation_is_of_this_version():
    """The required keys of https://citation-file-format.github.io 1.2.0, and those that other files have as well."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    assert citation["title"] == PROJECT["name"]
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["keywords"] == PROJECT["keywords"]
    assert all(author.keys() == {"name"} for author in citation["authors"])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=ROOT)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(built, wheel):
    sdist, from_sdist = built
    contents = [
        {n: archive.read(n) for n in archive.namelist()} for archive in map(zipfile.ZipFile, (wheel, from_sdist))
    ]
    assert contents[0] == contents[1]
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files", cwd=ROOT).split() if (ROOT / ".git").exists() else []
    assert {name for name in tracked if not name.startswith(".")} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("runs", "dist", ".venv"))]


@pytest.mark.slow
def test_an_index_takes_them(built):
    pytest.importorskip("twine")
    out = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *built], capture_output=True, text=True, check=False
    )
    assert out.returncode == 0, out.stdout + out.stderr
    assert out.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_metadata_of_the_wheel(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    metadata = email.message_from_bytes(archive.read(name))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata.get_payload().startswith("# compress-core")
