"""Choice points and choices of the loaded plugins, and choices whose point nobody has declared."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence

from compress_core.contract.choices import Choice, ChoicePoint
from compress_core.errors import PluginError
from compress_core.registry.plugins import ContributedChoice, PluginInfo, UnplacedChoice

# Names as alike as this are taken for misspellings of one another.
_ALIKE = 0.8


class ChoiceTable:
    """What has been contributed to choice points.

    A plugin may contribute to a point of another plugin that is not installed, or is a version without this point. Such
    a choice waits until the point is declared; until then nothing can choose it.

    Attributes:
        points: The choice points by name.
        choices: Name of a point -> name -> choice.
    """

    def __init__(self) -> None:
        self.points: dict[str, ChoicePoint] = {}
        self.choices: dict[str, dict[str, ContributedChoice]] = {}
        self._waiting: list[ContributedChoice] = []
        self._refused: list[UnplacedChoice] = []

    def check(
        self,
        points: Sequence[ChoicePoint],
        choices: Sequence[Choice],
        label: str,
        find_point: Callable[[str], ChoicePoint | None],
    ) -> None:
        """Checks what a plugin is about to contribute.

        Args:
            points: Its points.
            choices: Its choices.
            label: The beginning of messages.
            find_point: Returns the point with a name, for which it may load other plugins.

        Raises:
            PluginError: A name is taken, or a value does not fit its point.
        """
        own = {point.name: point for point in points}
        for name in own:
            if name in self.points:
                raise PluginError(f"{label}: the choice point '{name}' is declared already; choose another name")
        seen: set[tuple[str, str]] = set()
        for choice in choices:
            point = own.get(choice.point) or find_point(choice.point)
            if (choice.point, choice.name) in seen:
                raise PluginError(f"{label}: {_taken(choice, 'this plugin')}; choose another name")
            seen.add((choice.point, choice.name))
            if point is not None and (wrong := self._wrong(choice, point)) is not None:
                raise PluginError(f"{label}: {wrong}")

    def _wrong(self, choice: Choice, point: ChoicePoint) -> str | None:
        owner = self.choices.get(choice.point, {}).get(choice.name)
        if owner is not None:
            return f"{_taken(choice, str(owner.plugin))}; choose another name"
        wrong = point.check(choice.value)
        return None if wrong is None else f"'{choice.name}' of '{choice.point}' {wrong}; it is {point.description}"

    def add(self, points: Sequence[ChoicePoint], choices: Sequence[Choice], plugin: PluginInfo) -> None:
        """Adds what was checked, and the choices that have waited for these points, as far as they fit."""
        self.points |= {point.name: point for point in points}
        arrived = [ContributedChoice(choice, plugin) for choice in choices]
        waited = [found for found in self._waiting if found.choice.point in self.points]
        self._waiting = [found for found in (*self._waiting, *arrived) if found.choice.point not in self.points]
        for found in arrived:
            if found.choice.point in self.points:
                self.choices.setdefault(found.choice.point, {})[found.choice.name] = found
        for found in waited:
            wrong = self._wrong(found.choice, self.points[found.choice.point])
            if wrong is not None:
                self._refused.append(UnplacedChoice(found.choice, found.plugin, wrong, is_suspect=True))
            else:
                self.choices.setdefault(found.choice.point, {})[found.choice.name] = found

    def unplaced(self, owners: Collection[str]) -> list[UnplacedChoice]:
        """Returns the choices that nothing can choose, with the reason.

        Args:
            owners: Names of installed algorithms, initializers and plugins: of these a point would be known.
        """
        return [*self._refused, *(self._without_point(found, owners) for found in self._waiting)]

    def _without_point(self, found: ContributedChoice, owners: Collection[str]) -> UnplacedChoice:
        name = found.choice.point
        owner = name.partition(".")[0]
        reason = f"'{name}' is no choice point of what is installed"
        near = difflib.get_close_matches(name, self.points, n=1, cutoff=_ALIKE)
        if near:
            reason += f". Did you mean '{near[0]}'?"
        elif owner in owners or "." not in name:
            reason += f". There are: {', '.join(sorted(self.points))}"
        else:
            reason += f"; nothing named '{owner}' is"
        return UnplacedChoice(found.choice, found.plugin, reason, bool(near) or owner in owners or "." not in name)


def _taken(choice: Choice, owner: str) -> str:
    return f"'{choice.name}' of '{choice.point}' is contributed by {owner} already"
