"""YAML files and command-line overrides -> one tree of text that remembers where every value was written.

    tree = merge(read_yaml("recipe.yaml"), parse_overrides(["--optim.lr", "2e-4"]))

Text stays text here; build.py reads it once the declared type of its field is known. So `1e-4` is a number where a
number is wanted (YAML 1.1 alone calls it a word), `no` is a word where a word is wanted, and nothing is guessed, cast
or executed: YAML is only parsed into nodes, no constructor ever runs. Aliases, tags and duplicate keys are refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

NULL = ("", "~", "null", "Null", "NULL")


class RecipeError(ValueError):
    """What is wrong with what the user wrote; `problems` has one sentence per problem, all found in one go."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__(problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} problems", *problems]))


@dataclass
class Node:
    """A value as written: text, a list or a mapping. `where` is "file:line" or the flag; `plain` is unquoted text."""

    value: str | list[Node] | dict[str, Node]
    where: str
    plain: bool = True

    @property
    def is_null(self) -> bool:
        return self.plain and isinstance(self.value, str) and self.value in NULL

    def __str__(self) -> str:
        """The value as it reads in an error message."""
        if isinstance(self.value, dict):
            return "the mapping {" + ", ".join(self.value) + "}"
        if isinstance(self.value, list):
            return "the list [" + ", ".join(str(node) for node in self.value) + "]"
        return "null" if self.is_null else self.value if self.plain else f"the quoted text {self.value!r}"


def read_yaml(path: str | Path) -> Node:
    """Parse a recipe. Raises FileNotFoundError (naming recipes nearby) and RecipeError (naming file and line)."""
    path = Path(path)
    if not path.is_file():
        found = {str(recipe.name): recipe for recipe in sorted(path.parent.glob("*.y*ml"))}
        near = [str(found[name]) for name in difflib.get_close_matches(path.name, found, n=3)]
        state = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"recipe {path} {state}" + (f"; nearest: {', '.join(near)}" if near else ""))
    try:
        text = path.read_text(encoding="utf-8")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or (isinstance(event, yaml.NodeEvent) and event.tag):
                place = f"{path}:{event.start_mark.line + 1}"
                raise RecipeError(f"{place}: YAML aliases (*name) and tags (!name) are not read; write the value out")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        line, reason = (f":{mark.line + 1}", error.problem) if mark else ("", str(error).splitlines()[0])
        raise RecipeError(f"{path}{line}: not valid YAML: {reason}") from None
    node = _from_yaml(root, lambda mark: f"{path}:{mark.line + 1}") if root else Node({}, str(path))
    if not isinstance(node.value, dict):
        raise RecipeError(f"{path}: a recipe has lines such as `run_dir: runs/first`, but this file is {node}")
    return Node(node.value, str(path))


def parse_overrides(arguments: list[str]) -> list[tuple[str, Node]]:
    """`["--a.b", "1", "--c=[x, y]"]` -> `[("a.b", Node), ("c", Node)]`. Values are YAML, so `null` and lists work."""
    overrides, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise RecipeError(f"{flag!r} on the command line is not an override; write --section.field VALUE")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise RecipeError(f"--{key} needs a value: --{key} VALUE (a switch takes true or false)")
            text = rest.pop(0)
        where = f"--{key}"
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            root = None  # not YAML, such as "a: b: c"; it can still be meant as a word
        if root is None or (isinstance(root, yaml.ScalarNode) and root.style is None):
            overrides.append((key, Node(text, where)))
        else:
            overrides.append((key, _from_yaml(root, lambda mark, where=where: where)))
    return overrides


def merge(root: Node, overrides: list[tuple[str, Node]]) -> Node:
    """Put every override in its place in `root`, later ones winning; a null or missing section is started afresh."""
    for key, node in overrides:
        section, (*sections, name) = root, key.split(".")
        for step in sections:
            child = section.value.get(step)
            if child is None or not isinstance(child.value, dict):
                child = section.value[step] = Node({}, node.where)
            section = child
        section.value[name] = node
    return root


def _from_yaml(node: yaml.Node, place: Callable[[yaml.Mark], str]) -> Node:
    where = place(node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        return Node(node.value, where, plain=node.style is None)
    if isinstance(node, yaml.SequenceNode):
        return Node([_from_yaml(child, place) for child in node.value], where)
    mapping: dict[str, Node] = {}
    for key, value in node.value:
        name, key_where = str(key.value), place(key.start_mark)
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"{key_where}: a key must be a word, not a list or mapping")
        if name in mapping:
            raise RecipeError(f"{key_where}: {name!r} is written twice, first at {mapping[name].where}")
        child = _from_yaml(value, place)
        mapping[name] = Node(child.value, key_where, child.plain)  # an error should name the line of the key
    return Node(mapping, where)
