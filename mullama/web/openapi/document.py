"""The OpenAPI 3.1 document of an app: its routes, what resources say of themselves, and the types of their bodies.

Nothing in it depends on how this server is set up: it is the same for whoever asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import msgspec

from mullama.installation import VERSION
from mullama.web.http.request import SpellError
from mullama.web.openapi.operation import Operation, Parameter
from mullama.web.security import Access

_REF = "#/components/schemas/{name}"
_JSON = "application/json"
_METHODS = ("GET", "PUT", "POST", "DELETE", "PATCH")
#: Families of APIs by the folder of their routes, in their order.
_FAMILIES = {
    "openai": "OpenAI",
    "responses": "OpenAI",
    "batches": "OpenAI",
    "anthropic": "Anthropic",
    "ollama": "Ollama",
    "llama_server": "llama-server",
    "vectors": "OpenAI",
    "internal": "mullama",
    "openapi": "mullama",
}
_KEY_SCHEMES: dict[str, dict[str, Any]] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "xApiKey": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "Api-Key"},
}
_ACCESS = {
    Access.OPEN: "Needs no key.",
    Access.CLIENT: "Needs an API key, where the server has any.",
    Access.INTERNAL: "Needs a key, where the server has any; a client is shown its own.",
    Access.OPERATOR: "Needs the admin key, where the server has one.",
}
_STATUS_WORDS = {
    200: "The answer.",
    202: "It has begun.",
    503: "Not now; Retry-After says when.",
    501: "Not there yet.",
}


@dataclass(slots=True, frozen=True)
class Route:
    """As it was added to the app."""

    path: str
    resource: object
    suffix: str = ""


@dataclass(slots=True, frozen=True)
class Served:
    """One method of one path."""

    method: str
    path: str  # as OpenAPI writes it, in braces what varies
    resource: object
    operation: Operation | None  # None: the resource does not say

    @property
    def access(self) -> Access:
        access: Access = getattr(self.resource, "access", Access.OPERATOR)
        return Access.OPERATOR if access is Access.INTERNAL and self.method != "GET" else access


def served(routes: Iterable[Route]) -> Iterator[Served]:
    """Every method of every path that the app answers."""
    for route in routes:
        path = re.sub(r"\{(\w+)(:\w+)?\}", r"{\1}", route.path)
        told: Mapping[str, Operation] = getattr(route.resource, "operations", {})
        found = {}
        for key, operation in told.items():
            method, _, rest = key.partition(" ")
            if rest.startswith("/"):
                found[method, path + rest] = operation
            elif rest == route.suffix:
                found[method, path] = operation
        ending = f"_{route.suffix}" if route.suffix else ""
        is_open_ended = any("/" in key for key in told)  # what it answers depends on what is below the path
        for method in _METHODS:
            if hasattr(route.resource, f"on_{method.lower()}{ending}") and not (is_open_ended and method != "GET"):
                found.setdefault((method, path), None)  # type: ignore[arg-type]
        for (method, one), operation in found.items():
            yield Served(method, one, route.resource, operation)


def build(routes: Iterable[Route]) -> dict[str, Any]:
    """The document."""
    all_served = list(served(routes))
    types = [
        kind
        for one in all_served
        if one.operation is not None
        for kind in (one.operation.body, one.operation.answer)
        if kind is not None and not isinstance(kind, str)
    ]
    schemas, components = schemas_of(types)
    paths: dict[str, dict[str, Any]] = {}
    errors: dict[str, dict[str, Any]] = {}
    for one in all_served:
        family = family_of(one.resource)
        errors.setdefault(f"{family}Error", _error_schema(getattr(one.resource, "spell_error", None)))
        paths.setdefault(one.path, {})[one.method.lower()] = _operation(one, family, schemas)
    shown = dict.fromkeys(_FAMILIES.values())
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mullama",
            "version": VERSION,
            "description": "A local LLM server that speaks the APIs of OpenAI, Anthropic, Ollama and llama-server.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": [{"name": name} for name in (*shown, "Health")],
        "paths": paths,
        "components": {
            "schemas": components | errors,
            "securitySchemes": _KEY_SCHEMES,
        },
    }


def family_of(resource: object) -> str:
    return _FAMILIES.get(type(resource).__module__.split(".")[2], "Health")


def _operation(one: Served, family: str, schemas: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    told = one.operation or Operation("")
    words = f"{one.method.lower()} {one.path}"
    found: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", words).strip("_"),
        "tags": [family],
        "summary": told.does,
        "description": _ACCESS[one.access],
        "security": [] if one.access is Access.OPEN else [{name: []} for name in _KEY_SCHEMES],
    }
    names = re.findall(r"\{(\w+)\}", one.path)
    path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in names
    ]
    if parameters := path + [_parameter(parameter) for parameter in told.parameters]:
        found["parameters"] = parameters
    # What changes something under /internal has a type that no form has, also where there is nothing to say.
    if told.body is not None or (one.method != "GET" and one.access is Access.OPERATOR):
        content = {told.takes: {"schema": {} if told.body is None else schemas[told.body]}}
        found["requestBody"] = {"required": True, "content": content}
    responses = {str(status): _answer(status, told, schemas) for status in told.statuses}
    error = {_JSON: {"schema": {"$ref": _REF.format(name=f"{family}Error")}}}
    responses["default"] = {"description": "An error, as this API spells it.", "content": error}
    return found | {"responses": responses}


def _parameter(one: Parameter) -> dict[str, Any]:
    return {"name": one.name, "in": one.where, "description": one.says, "schema": dict(one.schema)}


def _answer(status: int, told: Operation, schemas: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if isinstance(told.answer, str):
        content[told.answer] = {}
    elif told.answer is not None:
        content[_JSON] = {"schema": schemas[told.answer]}
    if told.streams:
        content[told.streams] = {}
    found: dict[str, Any] = {"description": _STATUS_WORDS[status]}
    return found | ({"content": content} if content else {})


def _error_schema(spell_error: SpellError | None) -> dict[str, Any]:
    """The shape of an API's error, from one that it spells."""
    error: dict[str, Any] = {"message": "", "type": "", "param": None, "code": None}
    return _shape(spell_error(400, error) if spell_error is not None else {"error": error})


def _shape(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        properties = {name: _shape(one) for name, one in value.items()}
        return {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "string" if isinstance(value, str) else ["string", "null"]}


# -- types


def schemas_of(types: Iterable[Any]) -> tuple[dict[Any, dict[str, Any]], dict[str, dict[str, Any]]]:
    """The schema of each type, and the components that they refer to: msgspec's, with what it does not check itself.

    That is in ``field_schemas`` of a Struct: keywords by the field's name, beside what its type says (``anyOf`` and
    ``enum``: in its place), also of fields that only its API knows; in ``required_fields``, though the type lets them
    be None; and in ``object_schema``, keywords of the whole.
    """
    kinds = list(dict.fromkeys(types))
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    by_name = {kind.__name__: kind for kind in _structs(kinds)}
    for name, schema in components.items():
        schema.pop("title", None)
        if (kind := by_name.get(name)) is None:
            continue
        more: Mapping[str, Mapping[str, Any]] = getattr(kind, "field_schemas", {})
        required: tuple[str, ...] = getattr(kind, "required_fields", ())
        types = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        for field, property_ in schema["properties"].items():
            if property_.get("default", "") is None:
                del property_["default"]
            if field in required and "anyOf" in property_:
                property_["anyOf"] = [one for one in property_["anyOf"] if one != {"type": "null"}]
        for field, keywords in more.items():
            before = schema["properties"].get(field, {})
            is_instead = not {"enum", "anyOf"}.isdisjoint(keywords)
            schema["properties"][field] = merged = {**({} if is_instead else before), **keywords}
            if "enum" in keywords:
                merged["enum"] = [value for value in keywords["enum"] if _is_of(value, types.get(field, Any))]
        schema["required"] = [*schema.get("required", ()), *required]
        schema |= getattr(kind, "object_schema", {})
    return dict(zip(kinds, schemas, strict=True)), components


def _is_of(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _structs(types: Iterable[Any]) -> Iterator[type[msgspec.Struct]]:
    """All Structs within these types."""
    seen: set[Any] = set()
    todo = list(types)
    while todo:
        kind = todo.pop()
        if kind in seen:
            continue
        seen.add(kind)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            yield kind
            todo += [field.type for field in msgspec.structs.fields(kind)]
        else:
            todo += [one for one in get_args(kind) if not isinstance(one, str)]
