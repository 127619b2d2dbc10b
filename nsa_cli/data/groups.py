"""DATA on the command line: which files, and with what weight (`web.txt@0.7 code/@0.3`)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from nsa_cli.data.reading import bad_input, expand
from nsa_cli.data.synthetic import PREFIX

_WEIGHTED = re.compile(r"(.+)@([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


class Group(NamedTuple):
    """Files whose windows come up together. label: as the user wrote it, without the weight; "" for all of DATA.
    task: the synthetic task that it is instead of files."""

    label: str
    weight: float
    names: list[str]
    task: str = ""


def parse_data(sources: Sequence[str]) -> list[Group]:
    """All of DATA as one group, or, where its parts have weights, a group for each; a file is in the first that names it.

    `SOURCE@WEIGHT` gives a file, folder, glob or `-` a weight above 0; what is there under the whole name is itself. NsaError
    (exit 3): a source that is not there, a weight that is none, weights for some of the sources only.
    """
    pairs = [_weighted(source) for source in sources]
    if all(weight is None for _, weight in pairs):
        task = next((source for source in sources if _is_task(source)), None)
        if task is None:
            return [Group("", 1.0, expand(sources))]
        if len(sources) > 1:
            raise bad_input(f"{task} has no size that other DATA could be drawn beside", f"give every DATA a weight: {task}@0.5")
        return [Group("", 1.0, [task], task)]
    if bare := next((source for source, weight in pairs if weight is None), None):
        raise bad_input(f"{bare} has no weight, and other DATA has", f"give every DATA one: {bare}@0.5")
    found, seen = [], set[str]()
    for source, weight in pairs:
        if _is_task(source):
            found.append(Group(source, weight or 0.0, [source], source))
            continue
        names = expand([source], seen)
        if not names:
            raise bad_input(f"{source} names only files that other DATA has named", "a file has one weight: name it once")
        found.append(Group(source, weight or 0.0, names))
    return found


def _is_task(source: str) -> bool:
    return source.startswith(PREFIX) and not os.path.lexists(source)


def _weighted(source: str) -> tuple[str, float | None]:
    match = _WEIGHTED.fullmatch(source)
    if match is None or os.path.lexists(source):
        return source, None
    weight = float(match[2])
    if weight <= 0 or not math.isfinite(weight):
        hint = "weights are shares: web.txt@0.7 code.txt@0.3"
        raise bad_input(f"{source}: the weight {match[2]} is not above 0 and finite", hint)
    return match[1], weight
