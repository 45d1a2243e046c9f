"""The hardware profile: every number that the cost model knows of a cluster.

A profile is a JSON file in which each number has a unit and a source. Those in
``mlx_ep/cost/profiles`` are compiled from published figures, `mlx_ep.calibrate`
measures one on the cluster it runs on, and every number can be overridden.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from mlx_ep.comm import CAPABILITIES
from mlx_ep.cost.records import (
    CollectiveTable,
    Link,
    MatrixCost,
    quantity,
    slowest_link,
    slowest_matrix,
)
from mlx_ep.types import Packing

VERSION = 1
KINDS = ("published", "measured")

ProfilePart = TypeVar("ProfilePart", "Profile", Link, CollectiveTable, MatrixCost)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One rank of a cluster, and what connects the ranks.

    Attributes:
        name: of the chip or cluster.
        kind: ``published`` or ``measured``.
        note: for a person.
        links: by name; the first one is taken unless another is asked for.
        experts: runners of the experts, by `cost_key`. Where there is none for a
            packing, the limits of memory and arithmetic hold (`mlx_ep.cost.step`).
        dense: dense matrices by packing, likewise.
        sources: where each number comes from, by its path
            (``links.jaccl.latency``).
    """

    name: str
    kind: str = "measured"
    note: str = ""
    memory_bandwidth: float = quantity("B/s", "reading weights")
    copy_bandwidth: float = quantity(
        "B/s", "copying tokens, each byte read and written"
    )
    matmul_rate: float = quantity("FLOP/s", "dense quantized matrices, many rows")
    expert_rate: float = quantity("FLOP/s", "experts, rows sorted by expert")
    unsorted_rate: float = quantity("FLOP/s", "experts with few rows each")
    attention_rate: float = quantity("FLOP/s", "scores and values of the attention")
    block_seconds: float = quantity("s", "a routed block, whatever it computes")
    layer_seconds: float = quantity("s", "the rest of a layer, whatever it computes")
    step_seconds: float = quantity("s", "a step, whatever it computes")
    query_seconds: float = quantity(
        "s",
        "single queries: each multiply-add with a key or value; 0: as attention_rate",
        0.0,
    )
    unseen_seconds: float = quantity(
        "s",
        "prompts: each multiply-add with a key that a query does not see; 0: there are "
        "none",
        0.0,
    )
    score_seconds: float = quantity(
        "s", "each score of a query and a key, beside its multiply-adds", 0.0
    )
    prompt_score_seconds: float = quantity(
        "s", "and of a prompt, with the mask; 0: as score_seconds", 0.0
    )
    element_seconds: float = quantity(
        "s", "norms and sums of a layer, per number of the tokens"
    )
    route_seconds: float = quantity("s", "choosing experts, per token and expert")
    sync_seconds: float = quantity("s", "the host waiting for the device once")
    loop_seconds: float = quantity(
        "s", "what a loop over batches adds to a step; 0 in profiles without it", 0.0
    )
    loop_layer_seconds: float = quantity("s", "and to each layer", 0.0)
    sequence_seconds: float = quantity("s", "and for each sequence of it", 0.0)
    logit_seconds: float = quantity("s", "and for each of its logits", 0.0)
    memory_bytes: float = quantity("B", "that weights and caches may take")
    links: Mapping[str, Link] = field(default_factory=dict)
    experts: Mapping[str, MatrixCost] = field(default_factory=dict)
    dense: Mapping[str, MatrixCost] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def link(self, name: str | None = None) -> Link:
        """The link of a name; None: the first.

        Raises:
            ValueError: the profile has no such link.
        """
        if name is None and self.links:
            return next(iter(self.links.values()))
        if name is None or name not in self.links:
            raise ValueError(
                f"The profile {self.name!r} has no link {name!r}; it has "
                f"{', '.join(self.links) or 'none: it is for one rank'}."
            )
        return self.links[name]

    def source(self, path: str) -> str:
        """Where a number comes from, or that nobody said."""
        return self.sources.get(path, "not said")


# Numbers that nobody publishes: 0, and not in `sources`, where a profile has none.
MEASURED_ONLY = (
    "loop_seconds", "loop_layer_seconds", "sequence_seconds", "logit_seconds",
    "query_seconds", "unseen_seconds", "score_seconds", "prompt_score_seconds",
)  # fmt: skip

# What stands for a runner in `Profile.experts` where mlx-lm's own block runs.
OWN_BLOCK = "mlx-lm"


def cost_key(runner: str, packing: Packing) -> str:
    """The name of a runner's cost for a packing in `Profile.experts`."""
    return f"{runner}|{packing}"


# The parts of a record that are records, by the name of the field that maps to them.
_PARTS: dict[str, type] = {
    "links": Link,
    "experts": MatrixCost,
    "dense": MatrixCost,
    "tables": CollectiveTable,
}


def to_json(profile: Profile) -> dict[str, Any]:
    """A profile as JSON holds it: every number with unit and source."""
    return {"version": VERSION, **_write(profile, "", profile.sources)}


def _write(part: Any, path: str, sources: Mapping[str, str]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for item in fields(part):
        value = getattr(part, item.name)
        here = f"{path}{item.name}"
        if item.name in _PARTS:
            content[item.name] = {
                key: _write(value[key], f"{here}.{key}.", sources) for key in value
            }
        elif "unit" in item.metadata:
            number = list(value) if isinstance(value, tuple) else value
            content[item.name] = {
                "value": number,
                "unit": item.metadata["unit"],
                "source": sources.get(here, "not said"),
            }
        elif item.name != "sources":
            content[item.name] = value
    return content


def from_json(content: Any) -> Profile:
    """The profile that JSON holds.

    Raises:
        ValueError: which field is missing, unknown, of another unit or not a number.
    """
    if not isinstance(content, Mapping) or "version" not in content:
        raise ValueError("A profile must be a JSON object with a version.")
    if content["version"] != VERSION:
        raise ValueError(
            f"A profile's version must be {VERSION}; got {content['version']!r}. Run "
            "mlx_ep.calibrate again."
        )
    sources: dict[str, str] = {}
    rest = {key: value for key, value in content.items() if key != "version"}
    profile = _read(Profile, rest, "", sources)
    if profile.kind not in KINDS:
        raise ValueError(
            f"A profile's kind must be {' or '.join(KINDS)}; got {profile.kind!r}."
        )
    return replace(profile, sources=sources)


def _read(
    kind: type[ProfilePart], content: Any, path: str, sources: dict[str, str]
) -> ProfilePart:
    if not isinstance(content, Mapping):
        raise ValueError(f"{path.rstrip('.')} must be an object; got {content!r}.")
    known = {item.name: item for item in fields(kind) if item.name != "sources"}
    if unknown := sorted(set(content) - set(known)):
        raise ValueError(
            f"A profile has no {path}{unknown[0]}; here it has {', '.join(known)}."
        )
    values: dict[str, Any] = {}
    for name, item in known.items():
        here = f"{path}{name}"
        if name not in content:
            if item.default is MISSING and item.default_factory is MISSING:
                raise ValueError(f"A profile must hold {here}; it is missing.")
        elif name in _PARTS:
            if not isinstance(content[name], Mapping):
                raise ValueError(f"{here} must be an object; got {content[name]!r}.")
            values[name] = {
                key: _read(_PARTS[name], value, f"{here}.{key}.", sources)
                for key, value in content[name].items()
            }
        elif "unit" in item.metadata:
            values[name] = _number(content[name], here, item, sources)
        elif isinstance(content[name], str):
            values[name] = content[name]
        else:
            raise ValueError(f"{here} must be a text; got {content[name]!r}.")
    if "transport" in values and values["transport"] not in CAPABILITIES:
        raise ValueError(
            f"{path}transport must be one of {', '.join(CAPABILITIES)}; got "
            f"{values['transport']!r}."
        )
    if values.get("topology", "mesh") not in ("mesh", "ring"):
        raise ValueError(
            f"{path}topology must be mesh or ring; got {values['topology']!r}."
        )
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{path.rstrip('.')}: {error}") from error


def _number(
    content: Any, path: str, item: Field[Any], sources: dict[str, str]
) -> float | tuple[float, ...]:
    unit = item.metadata["unit"]
    if not isinstance(content, Mapping) or not {"value", "unit"} <= set(content):
        raise ValueError(
            f"{path} must be an object with value, unit and source; got {content!r}."
        )
    if content["unit"] != unit:
        raise ValueError(f"{path} must be in {unit}; got {content['unit']!r}.")
    sources[path] = str(content.get("source", "not said"))
    value = content["value"]
    many = value if isinstance(value, list) else [value]
    if isinstance(value, list) != (item.default == ()):
        wanted = "a list of numbers" if item.default == () else "a number"
        raise ValueError(f"{path} must be {wanted}; got {value!r}.")
    # A rate that is 0 would be divided by; a time that is 0 is a good one.
    is_rate = unit in ("B/s", "FLOP/s", "ranks")
    for number in many:
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not is_number or not math.isfinite(number) or number < 0:
            raise ValueError(f"{path} must be finite and not negative; got {number!r}.")
        if is_rate and number == 0:
            raise ValueError(f"{path} must be above 0; got {number!r}.")
    numbers = tuple(float(number) for number in many)
    return numbers if isinstance(value, list) else numbers[0]


def read_profile(file: Path) -> Profile:
    """The profile in a file.

    Raises:
        ValueError: it cannot be read, or what is wrong with which field.
    """
    try:
        return from_json(json.loads(file.read_text()))
    except OSError as error:
        raise ValueError(f"The profile {file} cannot be read: {error}.") from error
    except ValueError as error:
        raise ValueError(f"The profile {file} is not one: {error}") from error


def write_profile(profile: Profile, file: Path) -> None:
    """Write a profile; its folder is made where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(to_json(profile), indent=1) + "\n")


def shipped_profiles() -> list[str]:
    """The names of the profiles in the package, such as ``m3-ultra``."""
    folder = files("mlx_ep.cost") / "profiles"
    names = [item.name for item in folder.iterdir()]
    return sorted(name[:-5] for name in names if name.endswith(".json"))


def find_profile(name: str) -> Profile:
    """A profile by the name of a shipped one, or by its file.

    Raises:
        ValueError: there is neither.
    """
    shipped = shipped_profiles()
    if name in shipped:
        return from_json(
            json.loads((files("mlx_ep.cost") / "profiles" / f"{name}.json").read_text())
        )
    if not Path(name).expanduser().is_file():
        raise ValueError(
            f"A profile must be a file, or one of {', '.join(shipped)}; got {name!r}."
        )
    return read_profile(Path(name).expanduser())


def overridden(profile: Profile, settings: Mapping[str, Any]) -> Profile:
    """The profile with other numbers.

    Args:
        settings: numbers (or lists of them) by path, such as ``memory_bandwidth`` or
            ``links.jaccl.latency``; or nested objects, as a file holds them.

    Raises:
        ValueError: there is no such number, or it is not allowed.
    """
    content = to_json(profile)
    for path, value in _flat(settings, ""):
        here: Any = content
        names = path.split(".")
        for depth, name in enumerate(names):
            if not isinstance(here, Mapping) or name not in here or "value" in here:
                known = sorted(here) if isinstance(here, Mapping) else []
                raise ValueError(
                    f"The profile {profile.name!r} has no number {path!r}; under "
                    f"{'.'.join(names[:depth]) or 'it'} there are {', '.join(known)}."
                )
            here = here[name]
        if not isinstance(here, dict) or "value" not in here:
            raise ValueError(f"{path!r} is not a number of a profile.")
        here["value"], here["source"] = value, "set by the user"
    return from_json(content)


def _flat(settings: Mapping[str, Any], path: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{path}{name}.")
        else:
            found.append((f"{path}{name}", value))
    return found


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """What ``--set memory_bandwidth=700e9`` says; a list is ``1,2,3``.

    Raises:
        ValueError: a text is not NAME=NUMBER.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            numbers = [float(part) for part in value.split(",")]
        except ValueError:
            numbers = []
        if not equals or not name or not numbers:
            raise ValueError(
                f"--set must be NAME=NUMBER, as memory_bandwidth=700e9; got {text!r}."
            )
        settings[name.strip()] = numbers if len(numbers) > 1 else numbers[0]
    return settings


def slowest(profiles: Sequence[Profile]) -> Profile:
    """Of several ranks the slowest in everything: all wait for it.

    Links and costs that not all ranks have are left out.
    """
    first = profiles[0]
    values: dict[str, Any] = {}
    for item in fields(Profile):
        if "unit" not in item.metadata:
            continue
        numbers = [getattr(profile, item.name) for profile in profiles]
        values[item.name] = (
            max(numbers) if item.metadata["unit"] == "s" else min(numbers)
        )
    for name in ("experts", "dense"):
        tables = [getattr(profile, name) for profile in profiles]
        common = [key for key in tables[0] if all(key in table for table in tables)]
        merged = {key: slowest_matrix([t[key] for t in tables]) for key in common}
        values[name] = {key: cost for key, cost in merged.items() if cost is not None}
    values["links"] = {
        name: slowest_link([profile.links[name] for profile in profiles])
        for name in first.links
        if all(name in profile.links for profile in profiles)
    }
    names = list(dict.fromkeys(profile.name for profile in profiles))
    return replace(first, name=", ".join(names), **values)
