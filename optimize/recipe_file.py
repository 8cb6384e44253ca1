"""Recipes as TOML: those that come with Outpace and a user's own. No torch."""

from __future__ import annotations

import tomllib
import types
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from optimize.recipe import Recipe
from server.config import ConfigError

RECIPES = Path(__file__).parent / "recipes"
T = TypeVar("T")


def recipe_names() -> list[str]:
    """Recipes that come with Outpace."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(spec: str) -> Recipe:
    """The recipe of that name, or of that TOML file. Raises ConfigError naming field, value and valid values."""
    path = RECIPES / f"{spec}.toml"
    if spec not in recipe_names():
        path = Path(spec).expanduser()
        if path.suffix != ".toml" or not path.is_file():
            names = ", ".join(recipe_names())
            raise ConfigError(f"recipe: {spec!r} is not valid; use one of {names}, or an existing .toml file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from error
    try:
        return parse_recipe({"name": path.stem, **content})
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from error


def recipe_text(spec: str) -> str:
    """A recipe's TOML as it is written. Raises ConfigError."""
    load_recipe(spec)
    path = RECIPES / f"{spec}.toml"
    return (path if path.is_file() else Path(spec).expanduser()).read_text(encoding="utf-8")


def parse_recipe(content: Mapping[str, Any]) -> Recipe:
    """A recipe from what a TOML file holds. Raises ConfigError."""
    return _read(Recipe, content, "")


def recipe_fields(recipe: Recipe) -> dict[str, Any]:
    """All fields as JSON holds them; `parse_recipe` reads them back."""
    result: dict[str, Any] = _without_none(asdict(recipe))
    return result


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, (list, tuple)) else value


def _read(kind: type[T], content: Any, path: str) -> T:
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path.rstrip('.')}: {content!r} is not valid; use a table of fields")
    hints, known = get_type_hints(kind), {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(content) - set(known))
    if unknown:
        raise ConfigError(f"{path}{unknown[0]}: there is no such field; valid fields are {', '.join(known)}")
    missing = [n for n, f in known.items() if f.default is f.default_factory is MISSING and n not in content]
    if missing:
        raise ConfigError(f"{path}{missing[0]}: missing")
    values = {name: _value(hints[name], value, f"{path}{name}") for name, value in content.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from None


def _value(hint: Any, value: Any, path: str) -> Any:
    if isinstance(hint, types.UnionType):
        return _value(next(a for a in get_args(hint) if a is not types.NoneType), value, path)
    if get_origin(hint) is tuple:
        element = get_args(hint)[0]
        items = value if isinstance(value, list) else [value]
        several = len(items) > 1 or is_dataclass(element)
        return tuple(_value(element, item, f"{path}[{i}]" if several else path) for i, item in enumerate(items))
    if is_dataclass(hint):
        return _read(hint, value, f"{path}.")  # type: ignore[arg-type]
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}[hint]
        raise ConfigError(f"{path}: {value!r} is not valid; use {words}")
    return value
