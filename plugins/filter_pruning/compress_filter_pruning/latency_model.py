"""`LatencyModel`: the time of a forward as a function of the channels left, fitted to what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field

from compress_core.saved import STRICT, Items, Positive, Whole, damaged, parsed
from compress_filter_pruning.statistics import LatencyCheck

_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(le=1, allow_inf_nan=False)]


class _SavedFactor(BaseModel):
    model_config = STRICT
    fixed: _NotNegative
    slopes: dict[str, _NotNegative]


class _SavedPart(BaseModel):
    model_config = STRICT
    factors: Items[_SavedFactor]
    times: Items[_NotNegative]


class _SavedCheck(BaseModel):
    model_config = STRICT
    predicted: _Share
    measured: _Share
    seconds: _NotNegative
    threads: Positive


class _SavedModel(BaseModel):
    model_config = STRICT
    groups: Whole
    parts: Annotated[Items[_SavedPart], Field(min_length=1)]
    anchors: Items[tuple[_Share, _Share]]
    check: _SavedCheck | None


@dataclass(frozen=True)
class Part:
    """The time of one module, or of what belongs to none.

    With factors s1, s2 (sizes of its weight as shares of the full ones, linear in the channels left) it takes
    `times[0] + times[1] * s1 + times[2] * s2 + times[3] * s1 * s2`: what it takes anyway, what grows with the channels
    it reads or makes, and its multiplications. No time is negative, so no layer is faster with more channels.

    Attributes:
        fixed: The constant part of each factor; shape (factors,).
        slopes: What each channel of a group adds to a factor; shape (factors, groups).
        times: Seconds; shape (factors + 2,).
    """

    fixed: np.ndarray
    slopes: np.ndarray
    times: np.ndarray

    def of(self, left: np.ndarray) -> float:
        """Returns the seconds with `left[g]` channels left in group g."""
        return float(features(self.fixed, self.slopes, left) @ self.times)


def features(fixed: np.ndarray, slopes: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Returns what the times of a part are multiplied with: 1, its factors, and their product; shape (factors + 2,)."""
    factors = fixed + slopes @ left
    return np.concatenate([[1.0], factors, [factors.prod() if len(factors) > 1 else 0.0]])


@dataclass(frozen=True)
class LatencyModel:
    """The time of a forward as a function of the channels left, in seconds; has the method of `Costs` that levels need.

    Attributes:
        parts: What the time is the sum of.
        full: Channels of each group in the uncompressed model.
        anchors: Shares that are removed, as the sum says and as was measured; what the sum says is corrected with the
            straight lines between them.
        check: What was measured at the target; None if the target is 0.
    """

    parts: tuple[Part, ...]
    full: tuple[int, ...]
    anchors: tuple[tuple[float, float], ...] = ()
    check: LatencyCheck | None = None

    def of(self, left: Sequence[int] | np.ndarray) -> float:
        """Returns the seconds of a forward; fewer channels never take longer."""
        points = [(0.0, 0.0), *sorted(self.anchors), (1.0, 1.0)]
        summed, found = zip(*points, strict=True)
        # Noise of measurements must not make more channels faster.
        measured = np.maximum.accumulate(np.clip(found, 0.0, 1.0))
        return self._sum(self.full) * (1 - float(np.interp(self.summed(left), summed, measured)))

    def summed(self, left: Sequence[int] | np.ndarray) -> float:
        """Returns the share of the time that is removed, without correction."""
        return 1 - self._sum(left) / self._sum(self.full)

    def _sum(self, left: Sequence[int] | np.ndarray) -> float:
        sizes = np.asarray(left, np.float64)
        return sum(part.of(sizes) for part in self.parts)

    def corrected(self, left: Sequence[int], measured: float) -> LatencyModel:
        """Returns the model that says of these channels that what was measured is removed."""
        return replace(self, anchors=(*self.anchors, (self.summed(left), measured)))

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-able dict."""
        parts = [
            {
                "factors": [
                    {"fixed": float(f), "slopes": {str(g): float(row[g]) for g in np.flatnonzero(row)}}
                    for f, row in zip(part.fixed, part.slopes, strict=True)
                ],
                "times": part.times.tolist(),
            }
            for part in self.parts
        ]
        check = None if self.check is None else self.check.to_dict()
        return {
            "groups": len(self.full),
            "parts": parts,
            "anchors": [list(anchor) for anchor in self.anchors],
            "check": check,
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], full: Sequence[int], path: str = "latency") -> LatencyModel:
        """Restores a model from what `to_dict` returned.

        Args:
            saved: The dict.
            full: Channels of each group in the uncompressed model.
            path: Where the dict is, for messages.

        Raises:
            StateError: `saved` was not returned by `to_dict` for as many groups.
        """
        found, groups = parsed(_SavedModel, saved, path), len(full)
        if found.groups != groups:
            raise damaged(f"{path}.groups", f"there are {groups} groups, got {found.groups}")
        parts = []
        for number, part in enumerate(found.parts):
            at = f"{path}.parts.{number}"
            if len(part.times) != len(part.factors) + 2:
                raise damaged(f"{at}.times", f"needs {len(part.factors) + 2} numbers, got {len(part.times)}")
            slopes = np.zeros((len(part.factors), groups))
            for row, factor in zip(slopes, part.factors, strict=True):
                for group, slope in factor.slopes.items():
                    if group not in map(str, range(groups)):
                        raise damaged(at, f"there are {groups} groups, got '{group[:20]}'")
                    row[int(group)] = slope
            parts.append(Part(np.array([f.fixed for f in part.factors]), slopes, np.array(part.times)))
        check = None if found.check is None else LatencyCheck(**found.check.model_dump())
        model = cls(tuple(parts), tuple(full), tuple(found.anchors), check)
        whole = model._sum(full)
        if not 0 < whole < 1e9:
            raise damaged(f"{path}.parts", f"add up to {whole} seconds for the full model")
        return model


def fitted(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Returns the coefficients, none negative, whose products with the rows are closest to measured seconds.

    There are few columns, so every subset of them is tried, and the best one without negative coefficients is exact.

    Args:
        rows: Shape (measurements, columns).
        seconds: Shape (measurements,).
    """
    best, least = np.zeros(rows.shape[1]), float(seconds @ seconds)
    columns = [column for column in range(rows.shape[1]) if rows[:, column].any()]
    for count in range(1, len(columns) + 1):
        for chosen in itertools.combinations(columns, count):
            part = rows[:, chosen]
            found = np.linalg.lstsq(part, seconds, rcond=None)[0]
            error = float(np.square(part @ found - seconds).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                best, least = np.zeros(rows.shape[1]), error
                best[list(chosen)] = found
    return best
