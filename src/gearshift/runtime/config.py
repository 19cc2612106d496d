"""From a configuration node to an object, with one dataclass beside each class as its schema.

A node names a class by `_target_` and holds the fields of that class's `Config` dataclass, or of the class itself where
it is a dataclass. Every key and type is checked before anything is built, so a typo fails at once, by name. Only such
classes can be named: a configuration can never call an arbitrary function.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gearshift.runtime.errors import UsageError

T = TypeVar("T")
Node = DictConfig | Mapping[str, Any]
TARGET = "_target_"


def build(node: Node, **context: Any) -> Any:
    """The object a node describes: `target(Config(...), **context)`, or `target(**fields)` where it is a dataclass.

    Raises UsageError on an unknown target, an unknown or missing key, a value of the wrong type, or a value the
    schema's own checks refuse.
    """
    path = _path_of(node)
    fields = plain(node)
    target = _target_of(fields, path)
    schema = schema_of(target)
    config: Any = parse({key: value for key, value in fields.items() if key != TARGET}, schema, path=path, owner=target)
    return config if schema is target else target(config, **context)


def validate(cfg: Node) -> None:
    """Checks every node of `cfg` that has a `_target_` against its schema, building nothing. Raises as `build` does."""
    for path, node in targets(plain(cfg)):
        target = _target_of(node, path)
        fields = {key: value for key, value in node.items() if key != TARGET}
        parse(fields, schema_of(target), path=path, owner=target)


def targets(tree: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(dotted path, node) of every node of a plain tree that names a class."""
    if isinstance(tree, dict):
        if TARGET in tree:
            yield path, tree
            return
        for key, value in tree.items():
            yield from targets(value, _dotted(path, key))
    elif isinstance(tree, list):
        for position, value in enumerate(tree):
            yield from targets(value, _dotted(path, position))


def plain(node: Node) -> dict[str, Any]:
    """The node as plain dictionaries and lists, interpolations resolved. Raises UsageError where one cannot be."""
    try:
        config = node if isinstance(node, DictConfig) else OmegaConf.create(dict(node))
        tree = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(_first_line(error, _path_of(node))) from error
    return typing.cast(dict[str, Any], tree)


def parse(fields: Node, schema: type[T], *, path: str = "", owner: type | None = None) -> T:
    """An instance of the dataclass `schema` from `fields`: nested dataclasses, optionals, lists and dicts included.

    `path` is where the fields stand in the configuration and `owner` the class they are for; both only serve messages.
    Raises UsageError as `build` does.
    """
    tree = plain(fields)
    name = _qualified(owner or schema)
    _check_keys(tree, schema, path, name)
    try:
        merged = typing.cast(DictConfig, OmegaConf.merge(_writable(OmegaConf.structured(schema)), tree))
    except OmegaConfBaseException as error:
        raise UsageError(f"{_first_line(error, path)} (in {name})") from error
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise UsageError(f"{_dotted(path, missing[0])} has no value, and {name} needs one; set it")
    try:
        return typing.cast(T, _instance(merged, schema))
    except UsageError as error:
        raise UsageError(f"{path}: {error}" if path and path not in str(error) else str(error)) from error
    except ValueError as error:
        raise UsageError(f"{path or 'configuration'}: {error} (in {name})") from error


def schema_of(target: type) -> type:
    """The dataclass that describes a class's configuration: its `Config`, or the class itself."""
    schema = getattr(target, "Config", target)
    if not (isinstance(schema, type) and dataclasses.is_dataclass(schema)):
        raise UsageError(f"{TARGET}={_qualified(target)} has no configuration schema, so it cannot be named here")
    return schema


def locate(name: str, path: str = "") -> type:
    """The class of a dotted name. Raises UsageError when there is none, and quotes the near misses of its module."""
    where = _dotted(path, TARGET)
    module_name, _, class_name = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A third party that is absent is a different failure from a name that is wrong.
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise UsageError(f"{where}={name} needs the package {error.name}, which is not installed") from error
        raise UsageError(f"{where}={name}: there is no module {error.name}; check the spelling") from error
    except ValueError as error:
        raise UsageError(f"{where}={name!r} is not the dotted name of a class") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        known = [key for key, value in vars(module).items() if isinstance(value, type) and not key.startswith("_")]
        raise UsageError(f"{where}={name}: {module_name} has no class {class_name}{_suggest(class_name, known)}")
    return found


def _target_of(node: Mapping[str, Any], path: str) -> type:
    name = node.get(TARGET)
    if not isinstance(name, str):
        raise UsageError(f"{path or 'this node'} has no {TARGET}; its keys are: {', '.join(map(str, node)) or 'none'}")
    return locate(name, path)


def _check_keys(tree: Mapping[str, Any], schema: type, path: str, name: str) -> None:
    hints = typing.get_type_hints(schema)
    known = [field.name for field in dataclasses.fields(schema) if field.init]
    for key, value in tree.items():
        if key == TARGET:
            raise UsageError(f"{_dotted(path, key)}: {name} is described by fields alone; {TARGET} goes one level deep")
        if key not in known:
            listed = ", ".join(known) or "none"
            raise UsageError(
                f"{_dotted(path, key)}: unknown key of {name}{_suggest(str(key), known)}; known keys: {listed}"
            )
        inner = _dataclass_of(hints[key])
        if inner is not None and isinstance(value, Mapping):
            _check_keys(value, inner, _dotted(path, key), f"{name}.{key}")


def _writable(node: DictConfig) -> DictConfig:
    # The nodes of frozen dataclasses are read-only, each by itself, and would refuse the values of the configuration.
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not (child._is_none() or child._is_missing()):
            _writable(child)
    return node


def _instance(node: DictConfig, schema: type) -> Any:
    # OmegaConf.to_object would hand lists to fields that are tuples, and frozen schemas want tuples to be hashable.
    hints = typing.get_type_hints(schema)
    names = [field.name for field in dataclasses.fields(schema) if field.init]
    return schema(**{name: _converted(node[name], hints[name]) for name in names})


def _converted(value: Any, hint: Any) -> Any:
    if value is None:
        return None
    inner = _strip_optional(hint)
    if isinstance(value, DictConfig) and isinstance(inner, type) and dataclasses.is_dataclass(inner):
        return _instance(value, inner)
    origin, arguments = typing.get_origin(inner), typing.get_args(inner)
    if isinstance(value, ListConfig):
        each = arguments[0] if arguments else Any
        if origin is tuple and len(arguments) > 1 and arguments[1] is not Ellipsis:
            if len(arguments) != len(value):
                raise ValueError(f"expected {len(arguments)} values, got {len(value)}: {OmegaConf.to_container(value)}")
            return tuple(_converted(item, a) for item, a in zip(value, arguments, strict=True))
        items = [_converted(item, each) for item in value]
        return tuple(items) if origin is tuple or inner is tuple else items
    if isinstance(value, DictConfig):
        each = arguments[1] if len(arguments) == 2 else Any
        return {key: _converted(item, each) for key, item in value.items()}
    return value


def _strip_optional(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        rest = [argument for argument in typing.get_args(hint) if argument is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return hint


def _dataclass_of(hint: Any) -> type | None:
    inner = _strip_optional(hint)
    return inner if isinstance(inner, type) and dataclasses.is_dataclass(inner) else None


def _path_of(node: Node) -> str:
    return str(node._get_full_key(None)) if isinstance(node, DictConfig) else ""


def _dotted(path: str, key: object) -> str:
    return f"{path}.{key}".strip(".") if path else str(key)


def _qualified(target: type) -> str:
    return f"{target.__module__}.{target.__qualname__}"


def _suggest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _first_line(error: OmegaConfBaseException, path: str) -> str:
    """The library's message without its trailing lines, and with the whole dotted key."""
    message = str(error).splitlines()[0]
    key = _dotted(path, error.full_key) if error.full_key else path
    return f"{key}: {message}" if key else message
