"""Reading JSON so that an error names the file and the path of the field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

REQUIRED = object()


class Fields:
    """One object of a JSON file: every value checked, every key used.

    Args:
        file: for messages.
        path: of the object in the file, such as ``nodes[0].instances[1]``.
        content: what JSON holds there.

    Raises:
        ValueError: it is no object.
    """

    def __init__(self, file: str, path: str, content: Any) -> None:
        self.file, self.path = file, path
        if not isinstance(content, Mapping):
            raise ValueError(
                f"{file}: {path or 'the file'} must be an object; got "
                f"{_short(content)}."
            )
        self._content = content
        self._read: set[str] = set()

    def fail(self, key: str, message: str) -> ValueError:
        """The error of a field, to raise."""
        where = ".".join(part for part in (self.path, key) if part)
        return ValueError(f"{self.file}: {where}: {message}")

    def has(self, key: str) -> bool:
        """Whether it is there and not null."""
        return self._content.get(key) is not None

    def value(self, key: str, default: Any = REQUIRED) -> Any:
        """Whatever stands there; null is as if it were not there."""
        self._read.add(key)
        found = self._content.get(key)
        if found is not None:
            return found
        if default is REQUIRED:
            raise self.fail(key, "is missing.")
        return default

    def number(
        self,
        key: str,
        default: Any = REQUIRED,
        *,
        least: float | int = 0.0,
        above: float | int | None = None,
        most: float | int = math.inf,
    ) -> float:
        """A finite number from `least` (or above `above`) to `most`."""
        found = self.value(key, default)
        if not is_number(found) or not math.isfinite(found):
            raise self.fail(key, f"must be a number; got {_short(found)}.")
        if above is not None and found <= above:
            raise self.fail(key, f"must be above {above:g}; got {found:g}.")
        if not least <= found <= most:
            upper = "" if most == math.inf else f" to {most:g}"
            raise self.fail(
                key, f"must be {least:g}{upper or ' or more'}; got {found}."
            )
        return float(found)

    def integer(self, key: str, default: Any = REQUIRED, *, least: int = 0) -> int:
        """A whole number from `least` on."""
        found = self.value(key, default)
        if isinstance(found, bool) or not isinstance(found, int):
            raise self.fail(key, f"must be a whole number; got {_short(found)}.")
        if found < least:
            raise self.fail(key, f"must be {least} or more; got {found}.")
        return found

    def text(self, key: str, default: Any = REQUIRED) -> str:
        found = self.value(key, default)
        if not isinstance(found, str) or not found:
            raise self.fail(key, f"must be a text; got {_short(found)}.")
        return found

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        found = self.value(key, default)
        if not isinstance(found, bool):
            raise self.fail(key, f"must be true or false; got {_short(found)}.")
        return found

    def choice(self, key: str, options: Sequence[str], default: Any = REQUIRED) -> Any:
        found = self.value(key, default)
        if found not in options:
            raise self.fail(
                key, f"must be one of {', '.join(options)}; got {_short(found)}."
            )
        return found

    def objects(self, key: str) -> list[Fields]:
        """A list of objects, at least one."""
        found = self.value(key)
        if not isinstance(found, list) or not found:
            raise self.fail(
                key, f"must be a list with at least one object; got {_short(found)}."
            )
        prefix = f"{self.path}." if self.path else ""
        return [
            Fields(self.file, f"{prefix}{key}[{index}]", item)
            for index, item in enumerate(found)
        ]

    def object(self, key: str) -> Fields:
        prefix = f"{self.path}." if self.path else ""
        return Fields(self.file, f"{prefix}{key}", self.value(key))

    def close(self, ignored: Iterable[str] = ()) -> None:
        """Raises:
        ValueError: a key that nothing has read.
        """
        unknown = sorted(set(self._content) - self._read - set(ignored))
        if unknown:
            raise self.fail(
                unknown[0],
                f"is not known here; known are {', '.join(sorted(self._read))}.",
            )


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it cannot be read or is no JSON.
    """
    try:
        return json.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}: line {error.lineno}: must be JSON: {error.msg}."
        ) from error
