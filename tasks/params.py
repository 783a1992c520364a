"""Typed, frozen parameters: one section of ``params.yaml`` per stage, read by that stage alone."""

import difflib
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from tasks.errors import NightlyError


class Section(BaseModel):
    """A group of parameters; an unknown key or a wrong value is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def changed(self, **updates: Any) -> Self:
        """Return a validated copy with some values replaced."""
        return type(self)(**{**self.model_dump(), **updates})


SectionType = TypeVar("SectionType", bound=Section)


def read_section(path: Path, name: str, schema: type[SectionType]) -> SectionType:
    """Return section ``name`` of the parameter file at ``path``; a missing section means its defaults.

    Raises:
        NightlyError: the file is missing, is no mapping, or holds a key or value that is not allowed.
    """
    return parse_section(read_params_file(path).get(name) or {}, name, schema, path)


def read_params_file(path: Path) -> dict[str, Any]:
    """Return the parameter file as plain nested dictionaries."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NightlyError(f"{path} is missing: put a preset in place with 'nightly configure digits'") from None
    except yaml.MarkedYAMLError as error:
        # Not the error's own text, which quotes the line: it may hold a password.
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise NightlyError(f"{path} is not valid YAML{where}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise NightlyError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise NightlyError(f"{path} must hold 'section:' keys, but holds a {type(content).__name__}")
    return content


def parse_section(values: Any, name: str, schema: type[SectionType], path: Path) -> SectionType:
    """Validate ``values`` as section ``name``; ``path`` is named in errors.

    Raises:
        NightlyError: with one sentence per mistake: the key, what is allowed, what came.
    """
    if not isinstance(values, dict):
        raise NightlyError(f"{path}: '{name}' must hold 'key: value' lines, but is {values!r}")
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        mistakes = [_explain(problem, name, schema) for problem in error.errors()]
        raise NightlyError(f"{path}: " + "; ".join(mistakes)) from None


def nearest(word: str, allowed: list[str]) -> str:
    """Return a hint that names the allowed word closest to ``word``, else all of them."""
    close = difflib.get_close_matches(str(word), allowed, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"allowed: {', '.join(allowed)}"


def _explain(problem: Any, name: str, schema: type[BaseModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    where = ".".join([name, *location])
    if problem["type"] == "extra_forbidden":
        owner = _owner(schema, location[:-1])
        return f"unknown key '{where}', {nearest(location[-1], sorted(owner.model_fields))}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"'{where}': {message[0].lower()}{message[1:]}, but is {problem['input']!r}"


def _owner(schema: type[BaseModel], location: list[str]) -> type[BaseModel]:
    """Follow field names down to the nested model that an unknown key stands in."""
    for part in location:
        field = schema.model_fields.get(part)
        nested = field.annotation if field else None
        for candidate in (nested, *getattr(nested, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                schema = candidate
                break
    return schema
