"""Frozen dataclasses whose values are checked by pydantic, with one-line errors, and their conversion from and to YAML.

Values are parsed by the type of their field, not by YAML's rules: a text field keeps the text as typed (`no`, `007`,
`a dog: red`). `null` is None where a field allows it.
"""

import dataclasses
import json
import operator
import os
import re
import types
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

import pydantic_core
import yaml
from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError

from cond_diffusion.errors import UserError, check_text, did_you_mean, user_errors

MAX_TEXT_BYTES = 64 * 2**20  # of a text file that is read at once

Schema = TypeVar("Schema")


def _index(value: Any) -> Any:
    try:
        return operator.index(value)
    except TypeError:
        return value  # text, or a value that pydantic rejects


Integer = Annotated[int, BeforeValidator(_index)]
"""An integer of any kind, including NumPy's and torch's."""
Seed = Annotated[Integer, Field(ge=-(2**63), lt=2**64)]
"""What torch accepts as a seed: 64 bits, signed or unsigned."""
PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
Width = Annotated[int, Field(ge=1, le=2**20)]
"""Number of channels or units of a layer: bounded, so that the number of weights of a layer can be computed."""
Depth = Annotated[int, Field(ge=1, le=200)]
"""Number of layers of a network: bounded, because each is a Python object, even without memory for its weights."""
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def option(
    default: Any, description: str, *, group: str = "options", metavar: str | None = None, **constraints: Any
) -> Any:
    """Declare a field with a default, a description (in `--help` and the config reference), its argument group and
    value name on the command line, and constraints of pydantic's `Field`."""
    extra: Any = {"group": group, "metavar": metavar}
    return Field(default=default, description=description, json_schema_extra=extra, **constraints)


def expand_home(value: Any) -> Any:
    """Expand ~ at the beginning of a path."""
    return os.path.expanduser(value) if isinstance(value, str) else value  # noqa: PTH111 - Path would change the rest, too


def local_path(text: str) -> Path:
    """Convert an argument of the command line."""
    return Path(expand_home(text))


def _check_path(path: str) -> str:
    with suppress(UserError):
        if path and all(len(name.encode()) <= MAX_NAME for name in check_text(path, "").split("/")):
            return path
    raise PydanticCustomError("path", "a path in UTF-8 without NUL, not empty, whose names have at most 255 bytes")


MAX_NAME = 255  # bytes of a file name, in all common file systems
LocalPath = Annotated[str, BeforeValidator(expand_home), AfterValidator(_check_path)]
"""Text that can be a path: ~ is expanded."""


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def section(name: str) -> Callable[[type[Schema]], type[Schema]]:
    """Return a decorator that makes a class a frozen pydantic dataclass, whose errors are UserErrors of one line, with
    the name as the prefix of fields: "train" gives `train.batch_size`, "" the field name alone."""

    def decorate(plain: type[Schema]) -> type[Schema]:
        cls: Any = pydantic_dataclass(plain, frozen=True)
        construct: Any = cls.__init__
        known = {field.name for field in dataclasses.fields(cls)}

        @wraps(construct)
        def __init__(self: Any, *arguments: Any, **fields: Any) -> None:
            if unknown := fields.keys() - known:  # pydantic ignores them
                raise TypeError(f"{cls.__name__} has no field {min(unknown)!r}")
            try:
                construct(self, *arguments, **fields)
            except ValidationError as error:
                raise _user_error(error, name, cls) from error

        cls.__init__ = __init__
        return cls

    return decorate


def _user_error(error: ValidationError, name: str, schema: Any) -> UserError:
    """Return the first problem as one line: key, value, expectation."""
    # Each member of a union reports its own problem; the one with the longest path is the intended member.
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
        elif get_origin(kind) is dict:
            key, kind = f"{key}.{part}", get_args(kind)[1]
    expected = "one more value" if problem["type"] == "missing" else problem["msg"].replace("Input should be ", "")
    choices = re.findall("'([^']*)'", expected) if problem["type"] == "literal_error" else []
    value = problem["input"]
    prefix = f"{key}: " if key else ""
    return UserError(f"{prefix}{value!r:.80}{did_you_mean(str(value), choices)}; expected {expected}")


def from_json(schema: Any, fields: Any, where: str | Path) -> Any:
    """Construct a dataclass, or another type that pydantic validates, from the fields of a JSON file, without
    conversion, for example of text to numbers; unknown fields are ignored. Errors begin with `where`."""
    try:
        return TypeAdapter(schema).validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise UserError(f"{where}: {_user_error(error, '', schema)}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def parse_json(text: str | bytes, where: str | Path) -> dict[str, Any]:
    """Return the fields of a JSON object that is nested less than 200 deep; raise UserError if the text is not one."""
    with user_errors(f"{where}: damaged or truncated", ValueError):
        fields = pydantic_core.from_json(text)
    if not isinstance(fields, dict):
        raise UserError(f"{where}: damaged; expected a JSON object, got {fields!r:.60}")
    return fields


def read_json(file: Path) -> dict[str, Any]:
    """Return the fields of the JSON object in a file; see `from_json` for their check."""
    if not file.exists():
        raise UserError(f"{file.parent} is incomplete: there is no {file.name}")
    return parse_json(read_text(file), file)


def from_yaml(schema: type, text: str, where: str) -> dict[str, Any]:
    """Parse YAML text into keyword arguments of `schema`."""
    try:
        node = yaml.compose(text, Loader=yaml.BaseLoader)
        if node is not None and not isinstance(node, yaml.MappingNode):
            raise UserError("contains no `key: value` lines")
        return {} if node is None else _convert(schema, node, text, "", schema)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{where}: cannot be parsed as YAML: {_one_line(error)}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def from_override(schema: type, override: str) -> tuple[list[str], Any]:
    """Parse `key=value`, with the full key, into the parts of the key and the input of its field."""
    key, equals, value = check_text(override, "overrides").partition("=")
    if not equals:
        raise UserError(f"{override!r:.80} is not an override; expected key=value, for example train.batch_size=64")
    kind: Any = schema
    allows_none = False
    for name in key.split("."):
        fields = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if name not in fields:
            raise _unknown_key(key, schema)
        kind, allows_none = _without_none(fields[name])
    if dataclasses.is_dataclass(kind):
        first = dataclasses.fields(kind)[0].name
        raise UserError(f"{key}: {value!r:.80} is set for a section; expected one of its keys, as {key}.{first}=...")
    parsed: Any = None if allows_none and value == "null" else value
    if kind is not str:
        try:
            node = yaml.compose(value, Loader=yaml.BaseLoader) or yaml.ScalarNode("", "")
        except (yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{override!r:.80} cannot be parsed as key=value: {_one_line(error)}") from error
        parsed = _convert(kind | None if allows_none else kind, node, value, key, schema)
    return key.split("."), parsed


def to_yaml(config: Any) -> str:
    """Return all fields of a config, including defaults, as YAML. `from_yaml` restores equal values."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Writes floats as `repr` does, so that they are restored exactly."""


_Dumper.add_representer(float, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:float", repr(value)))


def _without_none(kind: Any) -> tuple[Any, bool]:
    """Return a type without Annotated and None, and whether it allowed None."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) not in (Union, types.UnionType):
        return kind, False
    members = [_without_none(member)[0] for member in get_args(kind) if member is not types.NoneType]
    return Union[tuple(members)], types.NoneType in get_args(kind)  # noqa: UP007 - members are known at run time only


def _convert(kind: Any, node: Any, text: str, key: str, schema: Any) -> Any:
    """Convert a YAML node to input of pydantic for the type `kind`: text, or nested lists and dicts of text."""
    kind, allows_none = _without_none(kind)
    content: Any = node.value
    is_empty = node.id == "scalar" and node.style is None and node.value in ("null", "~", "")
    if allows_none and is_empty:
        return None
    if dataclasses.is_dataclass(kind):
        if is_empty:
            return {}
        if node.id != "mapping":
            raise UserError(f"{key}: {_source(node, text)!r:.80}; expected a section of `key: value` lines")
        fields, converted = get_type_hints(kind), {}
        for name_node, value in content:
            name = _source(name_node, text)
            full_key = f"{key}.{name}" if key else name
            if name not in fields:
                raise _unknown_key(full_key, schema)
            if name in converted:
                raise UserError(f"{full_key}: given twice; remove one")
            converted[name] = _convert(fields[name], value, text, full_key, schema)
        return converted
    for member in get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,):
        origin, parts = get_origin(member), get_args(member)
        if origin in (list, tuple) and node.id == "sequence":
            return [_convert(parts[0], item, text, f"{key}[{i}]", schema) for i, item in enumerate(content)]
        if origin is dict and node.id == "mapping":
            items: dict[str, Any] = {}
            for name_node, item in content:
                name = _source(name_node, text)
                if name in items:
                    raise UserError(f"{key}.{name}: given twice; remove one")
                items[name] = _convert(parts[1], item, text, f"{key}.{name}", schema)
            return items
    return check_text(_source(node, text), key)


def _source(node: Any, text: str) -> str:
    """Return the text of a scalar; for lists and mappings, their source text."""
    return node.value if node.id == "scalar" else text[node.start_mark.index : _end(node)].strip()


def _end(node: Any) -> int:
    """Return the index after the last character of a node; YAML's end mark of a block is that of comments after it."""
    if node.id == "scalar" or node.flow_style:
        return node.end_mark.index
    end = _end(node.value[-1][1] if node.id == "mapping" else node.value[-1])
    return end if end > node.start_mark.index else node.end_mark.index  # the last child may be an alias


def _unknown_key(key: str, schema: Any) -> UserError:
    if key in (keys := _all_keys(schema)):  # with a dot in a file
        section_name, _, name = key.rpartition(".")
        return UserError(f"{key}: expected the section `{section_name}:` and in it, indented, `{name}: ...`")
    return UserError(f"{key}: there is no such config key{did_you_mean(key, keys)}")


def _all_keys(schema: Any, prefix: str = "") -> list[str]:
    """Return the full keys of all sections and fields."""
    keys = []
    for name, kind in get_type_hints(schema).items():
        keys.append(f"{prefix}{name}")
        if dataclasses.is_dataclass(kind):
            keys += _all_keys(kind, f"{prefix}{name}.")
    return keys


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_text(file: Path, option: str = "") -> str:
    """Return the text of a file."""
    where = f"{option}: {file}" if option else str(file)
    with user_errors(f"{where} cannot be read", OSError, ValueError):
        if not file.exists():
            existing = sorted(map(str, file.parent.glob("*.yaml"))) if file.parent.is_dir() else []
            raise UserError(f"{where} does not exist{did_you_mean(str(file), existing)}")
        if not file.is_file():  # a pipe or a device can be endless
            raise UserError(f"{where} is not a regular file")
        if (size := file.stat().st_size) > MAX_TEXT_BYTES:
            raise UserError(f"{where} has {size} bytes; expected at most {MAX_TEXT_BYTES}")
        return decode_text(file.read_bytes(), where)


def decode_text(content: bytes, name: str) -> str:
    """Return UTF-8 text without a byte order mark; raise UserError, beginning with `name`, for another encoding."""
    with user_errors(f"{name} is not UTF-8", UnicodeDecodeError, hint="; convert it"):
        text = content.decode("utf-8-sig")
    if "\0" in text:  # of UTF-16 without a byte order mark
        raise UserError(f"{name} is not UTF-8 (it contains NUL characters); convert it")
    return text
