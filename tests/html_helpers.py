"""Reads HTML pages, and holds them to what they promise: alone, well-formed, accessible."""

import itertools
import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Reader(HTMLParser):
    """Collects tags and text, and complains of tags that do not close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.ids = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def cells(reader_text, title):
    """The cells of the table with this caption, a list of texts for each row; bars and drawings have no text."""
    found = []
    table = re.search(rf"<caption>{re.escape(title)}</caption>(.*?)</table>", reader_text, re.DOTALL)
    assert table, title
    for row in re.findall(r"<tr.*?</tr>", table[1], re.DOTALL):
        parts = re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", row, re.DOTALL)
        found.append([re.sub(r"<[^>]*>", "", part).strip() for part in parts])
    return found


def check(text):
    """Asserts that a page is one file without scripts, and what axe would find; returns its reader."""
    reader = read(text)
    tags = [tag for tag, _ in reader.tags]
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(tags)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    for _, attributes in reader.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert len(set(reader.ids)) == len(reader.ids)
    _check_structure(reader, tags)
    _check_names(reader)
    return reader


def _check_structure(reader, tags):
    assert dict(reader.tags)["html"]["lang"] == "en"
    assert tags.count("title") == tags.count("main") == tags.count("h1") == 1
    assert any(attributes.get("name") == "viewport" for _, attributes in reader.tags)
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    targets = [a["href"][1:] for tag, a in reader.tags if tag == "a"]
    assert set(targets) <= set(reader.ids)
    sections = [a["id"] for tag, a in reader.tags if tag == "section"]
    assert targets in ([], sections)


def _check_names(reader):
    for tag, attributes in reader.tags:
        if attributes.get("role") in ("img", "group", "region"):
            assert attributes["aria-label"].strip()
        if tag == "nav":
            assert attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
        # What may be wider than the page scrolls by itself, and by the keyboard.
        if attributes.get("class") in ("wide", "drawing"):
            assert attributes["tabindex"] == "0"
        if tag == "svg":
            assert "viewbox" in attributes
