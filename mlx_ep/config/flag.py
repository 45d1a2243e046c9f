"""What the flag of a configuration's field says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Flag:
    """What the flag of an EPConfig field says.

    Attributes:
        help: without the default.
        name: of the flag, if it is not the field's.
        metavar: of its value, in the help.
        least: the smallest number that the field takes.
        otherwise: what the default means; None: the default itself.
    """

    help: str
    name: str | None = None
    metavar: str | None = None
    least: int | None = None
    otherwise: str | None = None


class Setting(NamedTuple):
    """A field of EPConfig.

    Attributes:
        kind: its type.
    """

    name: str
    kind: Any
    default: Any
    flag: Flag

    @property
    def flag_name(self) -> str:
        return self.flag.name or "--" + self.name.replace("_", "-")
