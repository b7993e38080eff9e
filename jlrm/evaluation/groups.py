"""Groups of a benchmark's items that a user names, for metrics group by group.

A file of groups is YAML or JSON. It names subsets (PandaLM: the field `motivation_app`), and may
say what share of a group's rows has a property, in percent:

    groups:
      Entertainment: {subsets: [IMDB, Spotify, Netflix], share: 28.72}
      Office: {subsets: [MS Excel, Gmail]}

Capitals make no difference. A subset is in one group at most; items of no group count in none.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jlrm.config import UsageError, nearest
from jlrm.evaluation.games import Item
from jlrm.runtime import settings


@dataclass(frozen=True)
class ItemGroup:
    subsets: list[str]
    share: float = math.nan  # percent; NaN: not known


@dataclass(frozen=True)
class GroupsFile:
    groups: dict[str, ItemGroup]


class Groups(NamedTuple):
    """The groups of a benchmark's items, and the group of each subset that has one."""

    named: Mapping[str, ItemGroup] = {}
    of_subset: Mapping[str, str] = {}


def read(path: str | pathlib.Path) -> dict[str, ItemGroup]:
    """Read a file of groups.

    Raises:
      UsageError: no such file, or it is not what stands above.
    """
    groups = settings.load_as(GroupsFile, path).groups
    if not groups:
        raise UsageError(f"{path} names no group.")
    owners: dict[str, str] = {}
    for name, group in groups.items():
        if not group.subsets:
            raise UsageError(f"{path}: group {name} names no subset.")
        if not (math.isnan(group.share) or 0 <= group.share <= 100):
            raise UsageError(f"{path}: group {name} has share={group.share}: wanted 0 to 100.")
        for subset in map(_folded, group.subsets):
            if subset in owners:
                raise UsageError(f"{path}: '{subset}' is in {owners[subset]} and in {name}.")
            owners[subset] = name
    return groups


def of_items(path: str | pathlib.Path, items: Sequence[Item]) -> Groups:
    """Read a file of groups of these items; without a path there are none.

    Raises:
      UsageError: as `read`, or a group names a subset that no item has.
    """
    if not path:
        return Groups()
    groups = read(path)
    there = {_folded(item.subset): item.subset for item in items if item.subset}
    found = {}
    for name, group in groups.items():
        for subset in group.subsets:
            if _folded(subset) not in there:
                close = nearest(_folded(subset), there) if there else "The items name none."
                raise UsageError(f"{path}: group {name}: there is no subset '{subset}'. {close}")
            found[there[_folded(subset)]] = name
    return Groups(groups, found)


def _folded(subset: str) -> str:
    return subset.strip().casefold()
