"""Regularized evolution over ranking coefficients (LeGR, Chin et al. 2020, arXiv:1904.12368; Real et al. 2019)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from compress_core import DataError
from compress_core.data.progress import progress
from compress_filter_pruning.ranking import RankingRequest
from compress_filter_pruning.statistics import Coefficients

# At the end of the search, mutations of scales are this much smaller than at its beginning.
_COOLING = 1.25


@dataclass(frozen=True)
class Space:
    """What coefficients are drawn from.

    Attributes:
        centre: The coefficients around which others are drawn.
        spreads: Name of a weight -> standard deviation of changes of its shift.
        sigma: Standard deviation of the logarithm of scales.
    """

    centre: Coefficients
    spreads: Mapping[str, float]
    sigma: float

    @classmethod
    def around(cls, request: RankingRequest, centre: Coefficients, sigma: float, width: float = 1.0) -> Space:
        """Returns the space whose shifts spread as the scores of each weight do, times a width."""
        values = request.importances
        return cls(
            centre, {n: width * abs(c[0]) * float(values[n].std(correction=0)) for n, c in centre.items()}, sigma
        )

    def drawn(self, generator: np.random.Generator) -> Coefficients:
        """Returns random coefficients."""
        return {name: self._changed(name, *pair, generator, self.sigma) for name, pair in self.centre.items()}

    def mutated(self, parent: Coefficients, generator: np.random.Generator, share: float, sigma: float) -> Coefficients:
        """Returns coefficients that differ from others in a share of the weights, and at least in one."""
        names = list(self.centre)
        count = min(len(names), max(1, int(share * len(names))))
        chosen = {names[i] for i in generator.choice(len(names), count, replace=False)}
        return {
            name: self._changed(name, *pair, generator, sigma) if name in chosen else pair
            for name, pair in parent.items()
        }

    def _changed(
        self, name: str, scale: float, shift: float, generator: np.random.Generator, sigma: float
    ) -> tuple[float, float]:
        factor, move = math.exp(generator.normal(0, sigma)), generator.normal(0, 1)
        return scale * factor, shift + float(move) * self.spreads[name]


@dataclass
class Found:
    """The best coefficients of a search, and what was tried.

    Attributes:
        best: The coefficients.
        reward: Their reward.
        rewards: The reward of each candidate in order.
    """

    best: Coefficients
    reward: float
    rewards: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Evolution:
    """A search: random candidates first, then mutations of the best of a random sample; the oldest one dies.

    Attributes:
        space: Where candidates come from.
        generations: Number of candidates.
        population_size: Number of candidates that can have children.
        num_samples: Number of random candidates (with repetition) of which the best has a child.
        mutate_percent: Share of the weights whose coefficients a child changes.
        random_seed: Seed of the search's own generator.
    """

    space: Space
    generations: int
    population_size: int
    num_samples: int
    mutate_percent: float
    random_seed: int

    def run(self, reward: Callable[[Coefficients], float], fixed: Mapping[int, Coefficients], path: str) -> Found:
        """Returns the best candidate; among equal ones the first.

        Args:
            reward: Larger is better; NaN is worse than everything.
            fixed: Number of a generation -> the candidate that it tries.
            path: Path of the config value, for messages.

        Raises:
            DataError: No candidate has a finite reward.
        """
        generator = np.random.default_rng(self.random_seed)
        population: deque[tuple[float, Coefficients]] = deque(maxlen=self.population_size)
        found = Found({}, -math.inf)
        for number in progress(range(self.generations), "ranking search", unit="candidate"):
            candidate = fixed.get(number) or self._next(number, population, generator)
            value = reward(candidate)
            value = value if math.isfinite(value) else -math.inf
            population.append((value, candidate))
            found.rewards.append(value)
            if value > found.reward:
                found.best, found.reward = candidate, value
        if not found.best:
            raise DataError(
                f"{path}: none of {self.generations} candidates has a finite result; prune less during the search "
                "(max_pruning), or check the functions and the data"
            )
        return found

    def _next(
        self, number: int, population: deque[tuple[float, Coefficients]], generator: np.random.Generator
    ) -> Coefficients:
        if number < self.population_size:
            return self.space.drawn(generator)
        rivals = [population[i] for i in generator.integers(0, len(population), self.num_samples)]
        parent = max(rivals, key=lambda rival: rival[0])[1]
        sigma = self.space.sigma * (1 - number / (_COOLING * self.generations))
        return self.space.mutated(parent, generator, self.mutate_percent, sigma)
