"""What the package index shows: the README, in which links to files of this repository lead nowhere.

hatchling calls this when it builds. pyproject.toml has the addresses under `tool.hatch.metadata.hooks.custom`: what
links to files begin with (`files`), and pictures (`pictures`). Without an address a link is its text alone, and a
picture is left out. hatch-fancy-pypi-readme does the same, but would have to be in every environment that installs a
checkout without isolation.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_RELATIVE = r"(?!https?://|mailto:|#)([^)\s]+)"
_PICTURE = re.compile(rf"!\[([^\]]*)\]\({_RELATIVE}\)")
_HTML_PICTURE = re.compile(r"<picture>.*?</picture>|<img\b[^>]*>", re.DOTALL)
_LINK = re.compile(rf"(?<!!)\[([^\]]*)\]\({_RELATIVE}\)")


class ReadmeHook(MetadataHookInterface):
    """Sets the long description."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the metadata to complete."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = for_index(text, files=self.config.get("files", ""), pictures=self.config.get("pictures", ""))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def for_index(text: str, *, files: str = "", pictures: str = "") -> str:
    """Returns the text as it stands alone.

    Args:
        text: Markdown with links that are relative to the repository.
        files: Address that links to files begin with, or nothing.
        pictures: Address that pictures begin with, or nothing.
    """
    # Every second part is a block of code, which stays as it is.
    parts = _FENCE.split(text)
    parts[::2] = [_part(part, files, pictures) for part in parts[::2]]
    return "".join(parts)


def _part(text: str, files: str, pictures: str) -> str:
    text = _PICTURE.sub(rf"![\1]({pictures}/\2)" if pictures else "", text)
    if not pictures:
        text = _HTML_PICTURE.sub("", text)
    return _LINK.sub(rf"[\1]({files}/\2)" if files else r"\1", text)
