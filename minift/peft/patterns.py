"""How a user names modules and parameters, and what happens when a name is wrong.

Modules (adapter targets) follow PEFT, so that `target_modules` means the same in both: a *list* holds full names or
suffixes that start after a dot; a single *string* is a regular expression that must match the full name;
`"all-linear"` is every projection except the LM head. Keys of `rank_pattern` and `alpha_pattern` are regular
expressions for the end of the name, and the first that matches counts. Parameters (freezing) follow `OptimConfig`:
regular expressions searched in the name.

A pattern that matches nothing is an error that shows the nearest names: the silent alternative trains something else.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

ALL_LINEAR = "all-linear"
LM_HEAD = "lm_head"


def select_modules(
    names: Sequence[str], targets: str | Sequence[str], exclude: str | Sequence[str] | None
) -> list[str]:
    """The `names` that `targets` matches and `exclude` does not, in order. ValueError if a pattern matches nothing."""
    if is_all_linear(targets):
        chosen = {name for name in names if name.rpartition(".")[2] != LM_HEAD}
    else:
        chosen = _match_modules(names, targets, "targets")
    if exclude is not None:
        chosen -= _match_modules(names, exclude, "exclude")
    if not chosen:
        raise ValueError(f"targets={targets!r} with exclude={exclude!r} leaves no module of {len(names)}")
    return [name for name in names if name in chosen]


def is_all_linear(targets: str | Sequence[str]) -> bool:
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def select_parameters(names: Sequence[str], patterns: Sequence[str], what: str) -> set[str]:
    """The `names` in which one of the regular expressions is found; ValueError if one of them is found in none."""
    found = (_nonempty({n for n in names if _compile(p, what).search(n)}, p, names, what) for p in patterns)
    return set().union(*found)


def is_within(name: str, modules: Sequence[str]) -> bool:
    """Whether the parameter `name` is of one of `modules`, names or suffixes."""
    path = name.split(".")
    return any(matches(".".join(path[:depth]), modules) for depth in range(1, len(path)))


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first of PEFT's rank/alpha patterns that matches the end of `name`, from a dot on; None if none does."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)


def check_endings(patterns: Iterable[str], names: Sequence[str], what: str) -> None:
    """ValueError for a rank/alpha pattern that matches the end of none of `names`."""
    for pattern in patterns:
        _compile(pattern, what)
        _nonempty({name for name in names if first_match([pattern], name)}, pattern, names, what)


def matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Whether the module `name` is meant by `patterns`: names or endings, or one regular expression."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def check_modules(names: Sequence[str], patterns: str | Sequence[str], what: str) -> None:
    """ValueError for a pattern of modules that matches none of `names`."""
    _match_modules(names, patterns, what)


def _match_modules(names: Sequence[str], patterns: str | Sequence[str], what: str) -> set[str]:
    if isinstance(patterns, str):
        _compile(patterns, what)
        matched = {name for name in names if matches(name, patterns)}
        ending = next((name for name in names if matches(name, [patterns])), None)
        if ending is not None and not matched:
            raise ValueError(
                f"{what}: {patterns!r} is a regular expression for full names, and matches none of {len(names)}; valid "
                f"as the ending of {ending}: the list [{patterns}]"
            )
        return _nonempty(matched, patterns, names, what)
    found = (_nonempty({name for name in names if matches(name, [p])}, p, names, what) for p in patterns)
    return set().union(*found)


def _compile(pattern: str, what: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what}: {pattern!r} is not a regular expression: {error}") from None


def _nonempty(matched: set[str], pattern: str, names: Sequence[str], what: str) -> set[str]:
    if matched:
        return matched
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    nearest = difflib.get_close_matches(pattern, [*endings, *names], n=3, cutoff=0.5) or endings[:8]
    raise ValueError(f"{what}: {pattern!r} matches none of {len(names)} names; nearest: {', '.join(nearest)}")
