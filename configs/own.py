"""The user's own tasks and models: `module:name` in the folder where they work. Only training imports them."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ValidationError

from configs.errors import UserError
from configs.schema.own import SIZES


def is_own(name: str) -> bool:
    """Whether a task or model is one of the user's."""
    return ":" in name


def own_files(name: str) -> list[Path]:
    """The files of the module, or of its whole package, if it lies in the current folder. Imports nothing."""
    top = name.partition(":")[0].partition(".")[0]
    here = Path.cwd()
    if (here / top / "__init__.py").is_file():
        return sorted(path for path in (here / top).rglob("*.py"))
    return [here / f"{top}.py"] if (here / f"{top}.py").is_file() else []


def check_own(key: str, name: str) -> None:
    """Raise UserError when no such module lies here and none is installed. The module is not imported."""
    top = name.partition(":")[0].partition(".")[0]
    if not own_files(name) and PathFinder.find_spec(top) is None:
        raise UserError(
            f"{key} {name}: there is no {top}.py in {Path.cwd()}, and no such package is installed\n"
            "start where the file lies, or correct the name"
        )


def make_own(section: str, name: str, options: dict[str, Any]) -> Any:
    """The object that the class or function `name` makes from its options. Raises UserError when either is wrong."""
    maker = _load(f"{section}.name", name)
    return maker(*_sections(section, name, maker, options))


def _load(key: str, name: str) -> Callable[..., Any]:
    check_own(key, name)
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # at the end: a user's file may have the name of one of our packages
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{key} {name}: importing {module_name} failed: {type(error).__name__}: {error}\n"
            f"{place.filename}, line {place.lineno}"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UserError(f"{key} {name}: {module.__file__} has no class or function {attribute!r}")
    return found


def _sections(key: str, name: str, maker: Callable[..., Any], options: dict[str, Any]) -> list[BaseModel]:
    """The checked section that `maker` takes as its first argument; nothing where it takes no argument."""
    function = maker.__init__ if inspect.isclass(maker) else maker
    parameters = inspect.signature(maker).parameters.values()
    takes = [parameter for parameter in parameters if parameter.default is parameter.empty]
    if not takes:
        if options:
            raise UserError(f"{key}.options: {name} takes no section, so it has no options")
        return []
    section = get_type_hints(function).get(takes[0].name)
    if not (inspect.isclass(section) and issubclass(section, BaseModel)):
        raise UserError(f"{key}.name {name}: its first argument, {takes[0].name}, needs a pydantic model as its type")
    known = {alias for field, info in section.model_fields.items() for alias in (field, info.alias) if alias}
    strange = sorted(options.keys() - known - set(SIZES))
    if strange and section.model_config.get("extra") != "allow":  # pydantic passes over them, and a typo with them
        close = difflib.get_close_matches(strange[0], known, 1)
        meant = f"; did you mean {close[0]}?" if close else f": it has {', '.join(sorted(known)) or 'none'}"
        raise UserError(f"{key}.options.{strange[0]}: {section.__name__} of {name} has no such key{meant}")
    try:
        return [section.model_validate(options)]
    except ValidationError as error:
        lines = [f"{key}.options.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UserError("\n".join(lines[:3])) from error
