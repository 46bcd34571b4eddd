"""Frozen dataclasses that check their values: pydantic's, with errors of one line, read from YAML by the fields' types.

YAML's own typing is not used: a text field receives the text that was typed (`no`, `007`, `a dog: red`), every other
field is parsed by its type. `null` is None where a field allows it.
"""

import dataclasses
import json
import operator
import re
import types
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError

from cond_diffusion.errors import UserError, did_you_mean

Schema = TypeVar("Schema")


def _index(value: Any) -> Any:
    try:
        return operator.index(value)
    except TypeError:
        return value  # text, or something that pydantic refuses


Integer = Annotated[int, BeforeValidator(_index)]
"""An integer of any kind, NumPy's and torch's too."""


def section(name: str) -> Callable[[type[Schema]], type[Schema]]:
    """Make a pydantic dataclass raise UserError, which is one line, in place of pydantic's ValidationError.

    Args:
        name: What precedes the fields' names in messages: "train" gives `train.batch_size`; "" gives the field alone.
    """

    def decorate(cls: type[Schema]) -> type[Schema]:
        construct: Any = cls.__init__

        @wraps(construct)
        def __init__(self: Any, *arguments: Any, **fields: Any) -> None:
            try:
                construct(self, *arguments, **fields)
            except ValidationError as error:
                raise _user_error(error, name, cls) from error

        cls.__init__ = __init__
        return cls

    return decorate


def _user_error(error: ValidationError, name: str, schema: Any) -> UserError:
    """Return the first problem as one line: key, value, expectation."""
    # Of a union each member reports; the one that came farthest is the one that was meant.
    problem = max(error.errors(include_url=False), key=lambda problem: len(problem["loc"]))
    if isinstance(raised := problem.get("ctx", {}).get("error"), UserError):
        return raised
    key, kind = name, schema
    for part in problem["loc"]:
        names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        if part in names:
            key = f"{key}.{part}" if key else str(part)
            kind = _without_none(get_type_hints(kind)[str(part)])[0]
        elif isinstance(part, int):
            key = f"{key}[{part}]"
    if problem["type"] == "unexpected_keyword_argument":
        raise TypeError(f"{schema.__name__} has no field {problem['loc'][-1]!r}") from error
    expected = {"missing": "one more value"}.get(problem["type"], problem["msg"].replace("Input should be ", ""))
    known = re.findall("'([^']*)'", expected) if problem["type"] == "literal_error" else []
    return UserError(
        f"{key}: {problem['input']!r:.80}{did_you_mean(str(problem['input']), known)}; expected {expected}"
    )


def from_json(schema: type[Schema], fields: Mapping[str, Any], where: str) -> Schema:
    """Construct a dataclass from fields of a JSON file, without reading text as numbers; UserError, naming the file."""
    try:
        return TypeAdapter(schema).validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {_user_error(error, '', schema)}") from error


def from_yaml(schema: type, text: str, where: str) -> dict[str, Any]:
    """Read the fields of `schema` from YAML text, as keyword arguments of it.

    Raises UserError, with the full key, for a key that the schema does not have or a value of another shape.
    """
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{where}: holds no `key: value` lines")
    return _convert(schema, node, text, "", schema)


def from_override(schema: type, override: str) -> dict[str, Any]:
    """Read `key=value`, the key with its section, as keyword arguments of `schema`; UserError as in `from_yaml`."""
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"{override!r} is no override; expected key=value, for example train.batch_size=64")
    kind: Any = schema
    allows_none = False
    for name in key.split("."):
        fields = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in fields:
            raise _unknown(key, schema)
        kind, allows_none = _without_none(fields[name])
    if dataclasses.is_dataclass(kind):
        raise UserError(f"{key}: is a section; expected one of its keys, {key}.{dataclasses.fields(kind)[0].name}=...")
    if kind is str:
        found = None if allows_none and value == "null" else value
    else:
        try:
            node = yaml.compose(value, Loader=yaml.BaseLoader) or yaml.ScalarNode("", "")
        except yaml.YAMLError as error:
            raise UserError(f"{override!r} cannot be read as key=value: {' '.join(str(error).split())}") from error
        found = _convert(kind | None if allows_none else kind, node, value, key, schema)
    fields_of: Any = found
    for name in reversed(key.split(".")):
        fields_of = {name: fields_of}
    return fields_of


def merge(first: Mapping[str, Any], second: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """Return the fields of both, those of the second winning; sections are merged field by field."""
    merged = dict(first)
    for name, value in second.items():
        kind = get_type_hints(schema)[name]
        merged[name] = merge(first.get(name, {}), value, kind) if dataclasses.is_dataclass(kind) else value
    return merged


def to_yaml(config: Any) -> str:
    """Return every field of a config, defaults too, as YAML that `from_yaml` reads back equal."""
    return yaml.dump(_plain(dataclasses.asdict(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def keys_of(schema: Any, prefix: str = "") -> list[str]:
    """Return the full keys of all sections and fields."""
    found = []
    for name, kind in get_type_hints(schema).items():
        found.append(f"{prefix}{name}")
        if dataclasses.is_dataclass(kind):
            found += keys_of(kind, f"{prefix}{name}.")
    return found


class _Dumper(yaml.SafeDumper):
    """Writes floats as Python does, which reads them back equal."""


_Dumper.add_representer(float, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:float", repr(value)))


def _plain(value: Any) -> Any:
    """Return nested dicts and lists of what YAML has a form for."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _without_none(kind: Any) -> tuple[Any, bool]:
    """Return a type without Annotated and without None, and whether None is one of its values."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    members = [_without_none(member)[0] for member in get_args(kind) if member is not types.NoneType]
    return Union[tuple(members)], types.NoneType in get_args(kind)  # noqa: UP007 - made at run time


def _convert(kind: Any, node: Any, text: str, key: str, schema: Any) -> Any:
    """Return a node as what pydantic parses into `kind`: text, or lists and dicts of it."""
    kind, allows_none = _without_none(kind)
    content: Any = node.value
    is_empty = node.id == "scalar" and node.style is None and node.value in ("null", "~", "")
    if allows_none and is_empty:
        return None
    if dataclasses.is_dataclass(kind):
        if node.id != "mapping":
            if is_empty:
                return {}
            raise UserError(f"{key}: {_source(node, text)!r:.80}; expected a section of `key: value` lines")
        fields, found = get_type_hints(kind), {}
        for name, value in content:
            full = f"{key}.{name.value}" if key else str(name.value)
            if name.value not in fields:
                raise _unknown(full, schema)
            found[name.value] = _convert(fields[name.value], value, text, full, schema)
        return found
    if kind is str:
        return _source(node, text)
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for member in members:
        origin, parts = get_origin(member), get_args(member)
        if origin in (list, tuple) and node.id == "sequence":
            return [_convert(parts[0], item, text, f"{key}[{i}]", schema) for i, item in enumerate(content)]
        if origin is dict and node.id == "mapping":
            return {name.value: _convert(parts[1], item, text, f"{key}.{name.value}", schema) for name, item in content}
    return _source(node, text)


def _source(node: Any, text: str) -> str:
    """Return a scalar's text; of anything else, which YAML took for a list or a mapping, what was typed."""
    return node.value if node.id == "scalar" else text[node.start_mark.index : node.end_mark.index].strip()


def _unknown(key: str, schema: Any) -> UserError:
    return UserError(f"there is no config key {key!r}{did_you_mean(key, keys_of(schema))}")


def read_text(file: Path, option: str) -> str:
    """Return a file's text; raise UserError, naming the option that gave it, where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        there = sorted(map(str, file.parent.glob("*.yaml"))) if file.parent.is_dir() else []
        raise UserError(f"{option}: no file {file}{did_you_mean(str(file), there)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{option}: {file} cannot be read: {' '.join(str(error).split())}") from error
