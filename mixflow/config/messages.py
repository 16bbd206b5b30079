"""The first of pydantic's errors, as one sentence."""

from __future__ import annotations

import re
from typing import Any

from mixflow.runtime.errors import did_you_mean


def sentence(error: Any, sections: dict[str, Any]) -> str:
    """Say what is wrong: section.entry.field, the value, and the fix."""
    where = _where(error["loc"], sections, missing=error["type"] == "missing")
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind.startswith("union_tag"):  # the key that tells the members of a union apart
        where = f"{where}.{context['discriminator'][1:-1]}"
        value = context.get("tag")
    what = _what(kind, value, context, error["msg"])
    names_a_field = kind == "value_error" and re.match("[a-z0-9_.]+: ", what)
    return f"{where}{'.' if names_a_field else ': '}{what}" if where else what


def _what(kind: str, value: Any, context: dict[str, Any], message: str) -> str:
    if kind == "value_error":
        return str(context["error"])
    if kind in ("missing", "union_tag_not_found"):
        return "missing, and nothing has a default: add it"
    if kind in ("literal_error", "union_tag_invalid"):
        known = re.findall("'([^']*)'", context.get("expected") or context["expected_tags"])
        return f"{value!r} is not known{did_you_mean(value, known)}"
    if kind in ("float_type", "int_type", "int_from_float"):
        return _not_a_number(value, whole=kind != "float_type")
    if kind == "bool_type":
        return f"{value!r} is neither true nor false: write one of them"
    for name, words in _LIMITS.items():
        if name in context and kind.startswith(("greater", "less")):
            return f"{value} is out of range: it must be {words} {context[name]:g}"
    if kind == "string_type":
        return f"{value!r} is not text: put it in quotes"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{value!r} is not a mapping: write keys and values"
    return f"{value!r} does not fit: {message[0].lower()}{message[1:]}"


_LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _not_a_number(value: Any, whole: bool) -> str:
    wanted = "a whole number" if whole else "a number"
    if not isinstance(value, str):
        return f"{value!r} is not {wanted}: write {wanted}"
    match = re.fullmatch(r"([+-]?\d+)(\.\d*)?[eE]([+-]?)(\d+)", value)
    if match is None:
        return f"'{value}' is text where {wanted} is needed: write {wanted}"
    if whole:
        return f"'{value}' is text, YAML reads no exponents here: write {float(value):.0f}"
    digits, decimals, sign, exponent = match.groups()
    lacks = "a dot" if decimals is None else "a sign in the exponent"
    return f"'{value}' is text, YAML needs {lacks}: write {digits}{decimals or '.0'}e{sign or '+'}{exponent}"


def _where(location: tuple[Any, ...], sections: Any, missing: bool) -> str:
    """Return section.entry.field, without the names of union members that pydantic puts between."""
    parts, value = [], sections
    for part in location:
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part] if part < len(value) else None
        elif not (missing and part == location[-1]):
            continue
        parts.append(str(part))
    return ".".join(parts)
