"""Keeps a page readable and small whatever a network or a plugin brings: long tables and texts are cut, and say so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from compress_core.pages import Block, Code, Details, Flow, Grid, Pairs, Part, Picture, Text

_ROWS, _LETTERS, _TEXT, _DRAWING = 600, 400, 40_000, 200_000


def bounded(blocks: Sequence[Block]) -> list[Block]:
    """Returns blocks of which none has more than a few hundred rows, or cells of more than a few hundred letters."""
    return [part for block in blocks for part in _bounded(block)]


def _bounded(block: Block) -> list[Block]:
    if isinstance(block, (Details, Part)):
        return [dataclasses.replace(block, blocks=bounded(block.blocks))]
    if isinstance(block, Pairs):
        pairs = [(_short(name), _short(value)) for name, value in block.pairs]
        return [Pairs(pairs[:_ROWS]), *_left_out(len(pairs))]
    if isinstance(block, Grid):
        return _table(block)
    if isinstance(block, Code) and len(block.text) > _TEXT:
        return [
            Code(block.title, block.text[:_TEXT]),
            Text(f"{len(block.text) - _TEXT:,} further letters are left out."),
        ]
    if isinstance(block, Picture) and len(block.svg) > _DRAWING:
        return [Text(f"A drawing of {len(block.svg):,} bytes is left out: {block.caption or block.description}")]
    return [block]


def _table(block: Any) -> list[Block]:
    rows = [tuple(map(_short, row)) for row in block.rows[:_ROWS]]
    changes: dict[str, Any] = {"rows": rows}
    if isinstance(block, Flow):
        changes["links"] = [(start, end) for start, end in block.links if end < len(rows)]
    return [dataclasses.replace(block, **changes), *_left_out(len(block.rows))]


def _left_out(rows: int) -> list[Block]:
    return [Text(f"{rows - _ROWS:,} further rows are left out.")] if rows > _ROWS else []


def _short(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, Picture)):
        return value
    text = str(value)
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"
