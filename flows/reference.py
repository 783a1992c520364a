"""The reference of ``params.yaml``, made from the schemas: ``python -m flows.reference > docs/configuration.md``."""

import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

from flows.settings import schemas
from tasks.params import Section

PREAMBLE = """\
# Configuration

Every key of `params.yaml`. What is left out has its default; an unknown key or a wrong value is one line that names the
key, what is allowed and what came. `nightly configure PRESET` puts a preset in place (`presets/`, each with its
hardware, time and accuracy); `dvc params diff` shows what differs from the last commit.

DVC's stages read `download`, `prepare`, `augment`, `model`, `train`, `export` and `evaluate`: a change there makes the
stages that read it, and those after them, run again. A change of the other sections makes nothing run again.

Made from the parameters' types by `python -m flows.reference > docs/configuration.md`; a test compares.
"""
_HEADINGS = ("key", "allowed", "default", "what")
_LIMITS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
_WORDS = {"integer": "whole number", "boolean": "true or false", "string": "text", "null": "null"}


def explanations(schema: type[Section]) -> dict[str, str]:
    """Return what a section says of its keys: the ``Attributes`` of its docstring and of those it inherits from."""
    found: dict[str, str] = {}
    for owner in reversed(schema.mro()):
        if not issubclass(owner, Section):
            continue
        attributes = inspect.cleandoc(owner.__doc__ or "").partition("Attributes:\n")[2]
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE):
            found[name] = " ".join(text.split())
        found |= {name: f"{field.description}." for name, field in owner.model_fields.items() if field.description}
    return found


def keys(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield each key of a section, those of the sections within it after it: name, allowed, default, explanation."""
    facts = schema.model_json_schema()
    yield from _keys(schema, facts["properties"], facts.get("$defs", {}), prefix)


def _keys(schema: type[Section], properties: dict, inner: dict, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    said = explanations(schema)
    for name, facts in properties.items():
        key, nested = prefix + name, _nested(schema, name)
        below = facts.get("$ref") or facts.get("items", {}).get("$ref")
        if nested is None or below is None:
            yield key, _allowed(facts), _default(facts), said.get(name, "")
            continue
        own = dict(inner[below.rpartition("/")[2]]["properties"])
        if "items" in facts:
            yield key, "list of: text, or the keys below", _default(facts), said.get(name, "")
            key += "[]"
        else:
            # The section may be given other defaults here than its own.
            given = facts.get("default", {})
            own = {each: {**own[each], **({"default": given[each]} if each in given else {})} for each in own}
            yield key, "the keys below", "", said.get(name, "")
        yield from _keys(nested, own, inner, f"{key}.")


def _nested(schema: type[Section], name: str) -> type[Section] | None:
    annotation = schema.model_fields[name].annotation
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next((one for one in candidates if isinstance(one, type) and issubclass(one, Section)), None)


def _allowed(facts: dict[str, Any]) -> str:
    """Return in words what a JSON schema allows."""
    if "anyOf" in facts:
        return " or ".join(map(_allowed, facts["anyOf"]))
    if "enum" in facts or "const" in facts:
        return ", ".join(f"`{value}`" for value in facts.get("enum", [facts.get("const")]))
    if "prefixItems" in facts:
        return f"list of {len(facts['prefixItems'])}: {_allowed(facts['prefixItems'][0])}"
    if facts["type"] == "array":
        return f"list of: {_allowed(facts['items'])}"
    limits = ", ".join(words.format(_value(facts[name])) for name, words in _LIMITS.items() if name in facts)
    return f"{_WORDS.get(facts['type'], facts['type'])} {limits}".rstrip()


def _default(facts: dict[str, Any]) -> str:
    return f"`{_value(facts['default'])}`" if "default" in facts else ""


def _value(value: Any) -> str:
    """Return a value as it may be written in YAML."""
    if isinstance(value, str):
        return value
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)


def _summary(schema: type[Section]) -> str:
    """Return what a section's docstring says before its attributes."""
    return _markdown(inspect.cleandoc(schema.__doc__ or "").partition("Attributes:\n")[0].strip())


def _markdown(text: str) -> str:
    return text.replace("``", "`")


def render() -> str:
    """Return the reference as Markdown."""
    lines = [PREAMBLE]
    for name, schema in schemas().items():
        lines += [f"## {name}", "", _summary(schema), "", f"| {' | '.join(_HEADINGS)} |", "| --- | --- | --- | --- |"]
        for key, allowed, default, text in keys(schema, f"{name}."):
            cells = (f"`{key}`", allowed, default, _markdown(text))
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(render(), end="")
