"""Domains with children: the tree that the YAML shows, and the flat domains that all code reads.

Experts, blends and mixtures know domains only, so the tree is taken apart before the settings are
checked: its leaves become ``domains``, and which of them form a group is kept beside them. What is
found wrong is told where it stands in the YAML.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_mergemix.config.mixtures import SUM_TOLERANCE
from megatron_mergemix.config.problems import KeyPath, Problem, shown, suggestion
from megatron_mergemix.config.section import Bounds, Section
from megatron_mergemix.mixtures.levels import Levels
from megatron_mergemix.mixtures.simplex import Bounds as SimplexBounds

if TYPE_CHECKING:
    from megatron_mergemix.config import Config

_KEYS = ("bounds", "children")

STAGES = ("coarse", "leaves", "composed")
"""What a hierarchical search calls the stages that belong to no single group."""


class Group(Section):
    """Domains that a hierarchical search treats as one."""

    leaves: list[str]
    bounds: Bounds = (0.0, 1.0)
    """Least and largest share of all of them together in any mixture the search may recommend."""


def levels_of(config: Config, bounds: SimplexBounds) -> Levels:
    """Return the groups of an experiment and their bounds.

    Args:
        config: the experiment.
        bounds: of its domains.

    Raises:
        ConfigError: no mixture is within all bounds.
    """
    limits = {name: group.bounds for name, group in config.groups.items()}
    return Levels(config.leaves_by_group(), list(config.domains), bounds, limits)


def bounded_levels(config: Config, bounds: SimplexBounds) -> Levels | None:
    """Return :func:`levels_of`; None where no group has bounds."""
    are_bounded = any(group.bounds != (0.0, 1.0) for group in config.groups.values())
    return levels_of(config, bounds) if are_bounded else None


@dataclass(frozen=True)
class Flat:
    """Settings without a tree.

    Attributes:
        data: as in the YAML, with the leaves in ``domains`` and ``groups`` beside it.
        problems: what is wrong with the tree itself, by its path in the YAML.
        parents: leaf -> group, of those that have one.
    """

    data: dict[str, Any]
    problems: list[Problem]
    parents: Mapping[str, str]

    def in_yaml(self, problems: Iterable[Problem]) -> list[Problem]:
        """Return problems of the flat settings with their paths in the YAML."""
        return [Problem(_in_yaml(each.path, self.parents), each.text) for each in problems]


def flattened(data: dict[str, Any]) -> Flat:
    """Return the settings with the children of ``domains`` as domains of their own.

    A value that is no tree at all is left as it is, for the models to refuse.
    """
    tree = data.get("domains")
    has_tree = isinstance(tree, dict) and any(_has_children(value) for value in tree.values())
    if not has_tree and _is_flat(data.get("groups")):  # settings that were written down for a job
        groups = data["groups"]
        return Flat(data, [], {leaf: name for name in groups for leaf in groups[name]["leaves"]})
    problems = []
    if "groups" in data:
        problems.append(
            Problem(
                ("groups",),
                "is not a setting; a group is a domain with children: "
                "domains.NAME.children.NAME.prefixes",
            )
        )
    if not isinstance(tree, dict) or not has_tree:
        return Flat(data, problems, {})
    domains: dict[Any, Any] = {}
    groups = {}
    parents: dict[str, str] = {}
    for name, settings in tree.items():
        if not _has_children(settings):
            problems += _taken(("domains", str(name)), name, domains, groups)
            domains[name] = settings
            continue
        problems += _taken(("domains", str(name)), name, domains, groups)
        problems += _problems_of_group(str(name), settings)
        children = settings["children"] if isinstance(settings["children"], dict) else {}
        given = {"bounds": settings["bounds"]} if "bounds" in settings else {}
        groups[str(name)] = {"leaves": [str(child) for child in children], **given}
        for child, leaf in children.items():
            path = ("domains", str(name), "children", str(child))
            problems += _taken(path, child, domains, groups)
            domains[child] = leaf
            parents[str(child)] = str(name)
    return Flat({**data, "domains": domains, "groups": groups}, problems, parents)


def _is_flat(groups: Any) -> bool:
    return isinstance(groups, dict) and all(
        isinstance(group, dict) and isinstance(group.get("leaves"), list)
        for group in groups.values()
    )


def _has_children(settings: Any) -> bool:
    return isinstance(settings, dict) and "children" in settings


def _taken(
    path: KeyPath, name: Any, domains: Mapping[Any, Any], groups: Mapping[str, Any]
) -> Iterator[Problem]:
    if name in domains or name in groups:
        yield Problem(
            path,
            "has a name that occurs twice; expected names that are unique among all domains and "
            "groups: experts and mixtures are called by them",
        )


def _problems_of_group(name: str, settings: Mapping[Any, Any]) -> Iterator[Problem]:
    path: KeyPath = ("domains", name)
    children = settings["children"]
    if not isinstance(children, dict):
        yield Problem((*path, "children"), f"is {shown(children)}, expected a mapping of domains")
    elif len(children) < 2:
        yield Problem(
            (*path, "children"),
            f"has {len(children)}, expected at least 2 to mix; write a single one as a domain of "
            "its own",
        )
    else:
        for child, leaf in children.items():
            if _has_children(leaf):
                yield Problem(
                    (*path, "children", str(child), "children"),
                    "is a group within a group, expected prefixes: there are two levels",
                )
    for key in settings:
        if key == "prefixes":
            yield Problem(path, "has both prefixes and children, expected exactly one of them")
        elif key == "max_epochs":
            yield Problem(
                (*path, key),
                "is given for a group, expected it at the children, whose data are repeated",
            )
        elif key not in _KEYS:
            yield Problem(
                (*path, str(key)),
                f"is not a setting.{suggestion(str(key), _KEYS)} Valid here: {', '.join(_KEYS)}.",
            )


def _in_yaml(path: KeyPath, parents: Mapping[str, str]) -> KeyPath:
    if path[:1] == ("groups",) and len(path) > 1:
        return ("domains", *path[1:])
    if path[:1] == ("domains",) and len(path) > 1 and path[1] in parents:
        return ("domains", parents[str(path[1])], "children", *path[1:])
    return path


def domain_path(config: Config, name: str) -> KeyPath:
    """Return where a domain stands in the YAML."""
    parents = {leaf: group for group, settings in config.groups.items() for leaf in settings.leaves}
    return _in_yaml(("domains", name), parents)


def group_problems(config: Config) -> list[Problem]:
    """Return what is wrong with groups and with the search through them; paths are flat."""
    return [*_bounds(config), *_hierarchy(config)]


def _bounds(config: Config) -> Iterator[Problem]:
    lows = {name: domain.bounds[0] for name, domain in config.domains.items()}
    highs = {name: domain.bounds[1] for name, domain in config.domains.items()}
    for name, group in config.groups.items():
        lows[name] = max(group.bounds[0], sum(lows.pop(leaf) for leaf in group.leaves))
        highs[name] = min(group.bounds[1], sum(highs.pop(leaf) for leaf in group.leaves))
        low, high = group.bounds
        path: KeyPath = ("groups", name, "bounds")
        if low > high:
            yield Problem(path, f"is [{low:g}, {high:g}], expected the least share first")
        elif lows[name] > highs[name] + SUM_TOLERANCE:
            least = sum(config.domains[leaf].bounds[0] for leaf in group.leaves)
            greatest = sum(config.domains[leaf].bounds[1] for leaf in group.leaves)
            yield Problem(
                path,
                f"is [{low:g}, {high:g}], but its children together have at least {least:g} and "
                f"at most {greatest:g}: no mixture fits",
            )
    if not any("bounds" in group.model_fields_set for group in config.groups.values()):
        return  # the sums of the bounds of all domains are checked with them
    for what, total, misses in (
        ("lower", sum(lows.values()), sum(lows.values()) > 1 + SUM_TOLERANCE),
        ("upper", sum(highs.values()), sum(highs.values()) < 1 - SUM_TOLERANCE),
    ):
        if misses:
            bound = "at most" if what == "lower" else "at least"
            yield Problem(
                ("domains",),
                f"have {what} bounds of groups that sum to {total:g}, expected {bound} 1: no "
                "mixture fits",
            )


def _hierarchy(config: Config) -> Iterator[Problem]:
    search = config.search
    if search.hierarchy is None:
        if search.group_trials != type(search).model_fields["group_trials"].default:
            yield Problem(
                ("search", "group_trials"),
                "is given, but nothing is searched group by group; set search.hierarchy to "
                "top_down or bottom_up, or leave it away",
            )
        for name, group in config.groups.items():
            if group.bounds != (0.0, 1.0):
                yield Problem(
                    ("groups", name, "bounds"),
                    "needs search.hierarchy: without it all domains are searched at once and "
                    "groups mean nothing; bound the children instead",
                )
        return
    path: KeyPath = ("search", "hierarchy")
    if not config.groups:
        yield Problem(
            path,
            f"is {search.hierarchy}, but no domain has children; write groups as "
            "domains.NAME.children, or leave it away",
        )
        return
    num_groups = len(config.leaves_by_group())
    if num_groups < 2:
        yield Problem(path, f"is {search.hierarchy}, but there is one group, expected at least 2")
    for name in STAGES:
        if name in config.domains or name in config.groups:
            yield Problem(
                ("groups" if name in config.groups else "domains", name),
                "is what a hierarchical search calls one of its stages; choose another name",
            )
    yield from _flat_only(config)
    yield from _trials(config, num_groups)


def _flat_only(config: Config) -> Iterator[Problem]:
    """Find settings whose meaning for one group alone is not defined."""
    search = config.search
    for key in ("min_share", "kl", "rounds", "points", "ensemble"):
        if getattr(search, key):
            yield Problem(
                ("search", key),
                "is given, but works on all domains at once; leave search.hierarchy away, or this",
            )


def _trials(config: Config, num_groups: int) -> Iterator[Problem]:
    search = config.search
    path: KeyPath = ("search", "group_trials")
    if search.trials < num_groups + 1:
        yield Problem(
            ("search", "trials"),
            f"is {search.trials}, expected at least {num_groups + 1}: every group alone, and one "
            "mixture",
        )
    if isinstance(search.group_trials, dict):
        for name in search.group_trials:
            if name not in config.groups:
                near, known = suggestion(name, config.groups), ", ".join(config.groups)
                yield Problem((*path, name), f"names no group.{near} Known: {known}.")
    for name, group in config.groups.items():
        given = isinstance(search.group_trials, dict) and name in search.group_trials
        trials, least = search.trials_in_group(name), len(group.leaves) + 1
        if trials < least:
            yield Problem(
                (*path, name) if given else path,
                f"is {trials}, expected at least {least} for {name}: every child alone, and one "
                "mixture",
            )


def leaves_by_group(
    domains: Sequence[str], groups: Mapping[str, Group]
) -> dict[str, tuple[str, ...]]:
    """Return group -> leaves in the order of ``domains``; a domain without one is its own group."""
    found: dict[str, tuple[str, ...]] = {}
    parents = {leaf: name for name, group in groups.items() for leaf in group.leaves}
    for leaf in domains:
        name = parents.get(leaf, leaf)
        found[name] = (*found.get(name, ()), leaf)
    return found
