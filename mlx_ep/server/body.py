"""Reading a body: every field is asked for by its type, others are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from mlx_ep.server.errors import ApiError, wrong

T = TypeVar("T")
# Of what was given, an error shows so many characters.
_SHOWN = 60


class Body:
    """An object of the request; `close` refuses the fields that nobody asked for.

    Args:
        content: what JSON held.
        where: the object's path in the body, "" for all of it.

    Raises:
        ApiError: 400, here and in every method: a field is not what it must be. Null
            is as if the field were left out, as OpenAI has it.
    """

    def __init__(self, content: Any, where: str = "") -> None:
        if not isinstance(content, dict):
            raise wrong(where or "body", f"must be a JSON object, got {shown(content)}")
        self.content: dict[str, Any] = content
        self.where = where
        self._known: set[str] = set()

    def path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def fail(self, name: str, message: str) -> ApiError:
        """400 that names a field of this object."""
        return wrong(self.path(name), message)

    def value(self, name: str) -> Any:
        self._known.add(name)
        return self.content.get(name)

    def has(self, name: str) -> bool:
        return self.content.get(name) is not None

    def string(self, name: str, default: str = "") -> str:
        found: str = self._typed(name, str, "a string", default)
        return found

    def boolean(self, name: str, default: bool = False) -> bool:
        return self._typed(name, bool, "true or false", default)

    def object(self, name: str) -> Body | None:
        found = self._typed(name, dict, "an object", None)
        return None if found is None else Body(found, self.path(name))

    def mapping(self, name: str) -> dict[str, Any] | None:
        """An object whose fields are anything."""
        return self._typed(name, dict, "an object", None)

    def array(self, name: str) -> list[Any]:
        return self._typed(name, list, "an array", None) or []

    def objects(self, name: str) -> Iterator[Body]:
        for index, item in enumerate(self.array(name)):
            yield Body(item, f"{self.path(name)}.{index}")

    def _typed(self, name: str, kind: type, said: str, default: Any) -> Any:
        found = self.value(name)
        if found is None:
            return default
        if not isinstance(found, kind):
            raise self.fail(name, f"must be {said}, got {shown(found)}")
        return found

    def integer(
        self, name: str, default: T, least: int = 0, most: int | None = None
    ) -> int | T:
        found = self.value(name)
        if found is None:
            return default
        is_whole = isinstance(found, int) and not isinstance(found, bool)
        if not is_whole or found < least or (most is not None and found > most):
            bounds = f"from {least} " + ("on" if most is None else f"to {most}")
            raise self.fail(
                name, f"must be a whole number {bounds}, got {shown(found)}"
            )
        return found

    def number(
        self,
        name: str,
        default: float,
        least: int | float,
        most: int | float = float("inf"),
    ) -> float:
        found = self.value(name)
        if found is None:
            return default
        is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
        if not is_number or not least <= found <= most or abs(found) == float("inf"):
            bounds = (
                "" if least == -float("inf") else
                f" from {least:g} on" if most == float("inf") else
                f" from {least:g} to {most:g}"
            )  # fmt: skip
            raise self.fail(name, f"must be a number{bounds}, got {shown(found)}")
        return float(found)

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        found = self.value(name)
        if found is None:
            return default
        if found not in choices:
            listed = ", ".join(map(repr, choices))
            raise self.fail(name, f"must be one of {listed}, got {shown(found)}")
        return found

    def ignore(self, *names: str) -> None:
        """Fields that say something about the caller, and nothing about the answer."""
        self._known.update(names)

    def refuse(self, reasons: Mapping[str, str], *empty: Any) -> None:
        """Features that are not there.

        Args:
            reasons: field -> what to do instead.
            empty: values beside null that ask for nothing.
        """
        for name, reason in reasons.items():
            found = self.value(name)
            if found is not None and not any(
                found == value and type(found) is type(value) for value in empty
            ):
                message = f"is not available here: {reason}; got {shown(found)}"
                path = self.path(name)
                raise ApiError(400, f"{path} {message}", path, "unsupported_parameter")

    def close(self) -> None:
        """Refuse what nobody asked for; null asks for nothing."""
        for name, value in self.content.items():
            if name not in self._known and value is not None:
                path = self.path(name)
                message = (
                    f"{path} is no field of this request; known are "
                    f"{', '.join(sorted(self._known))}; got {shown(self.content[name])}"
                )
                raise ApiError(400, message, path, "unknown_parameter")


def read_body(raw: bytes) -> Body:
    """Raises:
    ApiError: 400: no JSON object, or a number that JSON does not know.
    """

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON number")

    try:
        content = json.loads(raw, parse_constant=refuse)
        if b"\\ud" in raw.lower():  # half a character, which no text can hold
            json.dumps(content, ensure_ascii=False).encode()
        return Body(content)
    except RecursionError:
        problem = "it is nested too deeply"
    except ValueError as error:  # JSON, and UTF-8
        problem = str(error)
    raise ApiError(400, f"body must be JSON: {problem}.", code="invalid_json")


def shown(value: Any) -> str:
    """A value in an error: its type, and what of it is short."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
