"""A tree of text (nodes.py) -> frozen dataclasses, by their declared types, with every problem reported at once.

    config = build(SomeDataclass, tree)

Types understood: bool, int, float (finite), str, None, Literal, unions of these, list[X], tuple[X, ...], tuple[X, Y],
dict[str, X], and dataclasses of them; in a union of dataclasses a field whose type is a Literal of one value says which
is meant. Rules about values belong in `__post_init__`, which raises ValueError.

jsonargparse was tried first. It does the typing, but names no nearest field, no file and no line, stops at the first
problem, documents no field of an optional section, and lets the ValueErrors of `__post_init__` through as tracebacks.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from typing import Any, Literal, get_args, get_origin

from minift.recipe.describe import describe, is_required, is_union, sections_of, to_plain, variants, walk
from minift.recipe.nodes import NULL, Node, RecipeError

INTEGER = re.compile(r"[+-]?[0-9][0-9_]*")
BOOLEANS = {"true": True, "True": True, "false": False, "False": False}


def build(cls: type, node: Node, key: str = "", root: type | None = None) -> Any:
    """Construct the dataclass `cls` from a mapping. `key`: its dotted name, "" at the top; `root`: the outermost class.

    Raises RecipeError with a sentence for every unknown name, wrong type, missing field and broken rule.
    """
    if not isinstance(node.value, dict):
        raise RecipeError(f"{_at(key, node)} is {node}; valid: {describe(cls)}")
    root, prefix = root or cls, f"{key}." if key else ""
    hints, fields = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    problems: list[str] = []
    values = {}
    for name, child in node.value.items():
        if name not in fields:
            problems.append(_unknown(prefix + name, child, cls, root))
            continue
        try:
            values[name] = convert(hints[name], child, prefix + name, root)
        except RecipeError as error:
            problems += error.problems
    for name, field in fields.items():
        if name not in node.value and is_required(field):
            problems.append(f"{prefix}{name} is missing ({node.where}); give it {describe(hints[name])}")
    if problems:
        raise RecipeError(*problems)
    try:
        return cls(**values)
    except ValueError as error:
        text = str(error)
        named = [child for name, child in node.value.items() if re.search(rf"\b{name}\b", text)]
        place = named[0].where if len(named) == 1 else node.where
        raise RecipeError(f"{text if text.startswith(prefix) else f'{key}: {text}'} ({place})") from error


def convert(hint: Any, node: Node, key: str, root: type) -> Any:
    """The value of `node` as the declared type `hint`; RecipeError names `key`, place, value and what is valid."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_union(hint):
        members = [member for member in arguments if member is not type(None)]
        if node.is_null and len(members) < len(arguments):
            return None
        sections = sections_of(hint)
        if len(sections) > 1 and isinstance(node.value, dict):
            return build(_variant(sections, node, key), node, key, root)
        if len(members) == 1 and (dataclasses.is_dataclass(members[0]) or not isinstance(node.value, str)):
            return convert(members[0], node, key, root)  # what it says about the inside is worth more than "not valid"
        for member in sorted(members, key=lambda member: member is str):  # any text is a str, so try that last
            try:
                return convert(member, node, key, root)
            except RecipeError:
                continue
    elif dataclasses.is_dataclass(hint):
        return build(hint, node, key, root)
    elif isinstance(node.value, list) and origin in (list, tuple):
        inner = list(arguments) if origin is tuple and Ellipsis not in arguments else [arguments[0]] * len(node.value)
        if len(inner) == len(node.value):
            pairs = enumerate(zip(inner, node.value, strict=True))
            return origin(convert(item_hint, item, f"{key}[{i}]", root) for i, (item_hint, item) in pairs)
    elif isinstance(node.value, dict) and origin is dict:
        return {name: convert(arguments[1], child, f"{key}.{name}", root) for name, child in node.value.items()}
    elif isinstance(node.value, str) and (value := _scalar(hint, node.value, node.plain)) is not None:
        return value
    choices = [str(choice) for choice in arguments] if origin is Literal else []
    raise RecipeError(_not_one_of(choices, node, key, describe(hint)))


def differences(a: Any, b: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, value in `a`, value in `b`) wherever two configurations of the same class differ."""
    a, b = to_plain(a), to_plain(b)
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [(key, a, b)]
    names = dict.fromkeys([*a, *b])
    return [d for name in names for d in differences(a.get(name), b.get(name), f"{key}.{name}" if key else name)]


def _scalar(hint: Any, text: str, plain: bool) -> Any | None:
    """`text` as a bool, int, float, str or member of a Literal; None when it is not one."""
    if get_origin(hint) is Literal:
        return next((choice for choice in get_args(hint) if str(choice) == text), None)
    if hint is str:
        return None if plain and text in NULL else text
    if hint is bool and plain:
        return BOOLEANS.get(text)
    if hint is int and plain:
        return int(text) if INTEGER.fullmatch(text) else None
    if hint is float and plain:
        try:
            return float(text) if math.isfinite(float(text)) else None
        except ValueError:
            return None
    return None


def _variant(sections: list[type], node: Node, key: str) -> type:
    """The one of `sections` that the mapping `node` is, by the field that tells them apart."""
    name, choices = variants(sections)
    chosen = node.value.get(name)
    if chosen is None:
        return sections[0]
    if str(chosen) not in choices:
        raise RecipeError(_not_one_of(list(choices), chosen, f"{key}.{name}", " | ".join(choices)))
    return choices[str(chosen)]


def _not_one_of(choices: list[str], node: Node, key: str, valid: str) -> str:
    """The sentence for a value that is none of `choices`, with the nearest one that is."""
    nearest = difflib.get_close_matches(str(node.value), choices, n=1)
    question = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{_at(key, node)} is {node}; valid: {valid}{question}"


def _unknown(key: str, node: Node, cls: type, root: type) -> str:
    """The sentence for a name that does not exist, with the nearest one that does.

    In this order: the same name in another section, a similar spelling in this one, a field whose documentation uses
    these words (learning_rate -> optim.lr), a similar full key.
    """
    section, _, name = key.rpartition(".")
    fields = sorted(walk(root), key=lambda field: not field.key.startswith(f"{section}."))  # this section's first
    names = [field.name for field in dataclasses.fields(cls)]
    near = [field.key for field in fields if field.key.rpartition(".")[2] == name]
    near += [f"{section}.{n}" if section else n for n in difflib.get_close_matches(name, names, n=1, cutoff=0.7)]
    words = [word for word in name.split("_") if len(word) > 1]
    starts = [re.compile(rf"\b{re.escape(word)}", re.I) for word in words]
    leaves = [field for field in fields if not field.section and words]
    near += [field.key for field in leaves if all(start.search(field.doc) for start in starts)]
    near += difflib.get_close_matches(key, [field.key for field in fields], n=1)
    question = _other_variant(section, name, root) or (f"did you mean {near[0]}? " if near else "")
    return f"{_at(key, node)} is not a field; {question}valid in {section or 'a recipe'}: {', '.join(names)}"


def _other_variant(section: str, name: str, root: type) -> str:
    """The beginning of a sentence that says which variants of `section` have a field `name`; "" if there are none."""
    having = [
        entry
        for entry in walk(root)
        if entry.key == section and entry.section and name in {f.name for f in dataclasses.fields(entry.section)}
    ]
    if not having:
        return ""
    tag, choices = variants(sections_of(having[0].hint))
    values = [value for value, choice in choices.items() if any(choice is entry.section for entry in having)]
    return f"it belongs to {tag}: {' | '.join(values)}; "


def _at(key: str, node: Node) -> str:
    return f"--{key}" if node.where == f"--{key}" else f"{key} ({node.where})"
