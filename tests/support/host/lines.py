"""Source lines of addresses in a compiled kernel, from its DWARF information."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from elftools.dwarf.compileunit import CompileUnit
from elftools.dwarf.die import DIE
from elftools.dwarf.dwarfinfo import DWARFInfo
from elftools.dwarf.lineprogram import LineProgram
from elftools.dwarf.ranges import BaseAddressEntry
from elftools.elf.elffile import ELFFile


def source_line(module: Path, address: int) -> str:
    """``file:line`` of the call before an address: of its innermost frame that lies
    outside the shim; empty where nothing is known."""
    debug = _debug_information(module)
    frames: list[str] = []
    for unit in debug.iter_CUs():
        frames += _frames(debug, unit, address - 1)
    ours = [frame for frame in frames if "/shim/" not in frame]
    return (ours or frames or [""])[0].rsplit("/", 1)[-1]


@lru_cache(maxsize=4)
def _debug_information(module: Path) -> DWARFInfo:
    return ELFFile(io.BytesIO(module.read_bytes())).get_dwarf_info()


def _frames(debug: DWARFInfo, unit: CompileUnit, address: int) -> Iterator[str]:
    """Where an address is, then from where it was inlined, inside out."""
    program = debug.line_program_for_CU(unit)
    place = _row(program, address) if program else None
    if program is None or place is None:
        return
    yield _name(program, *place)
    inlined = [
        die
        for die in unit.iter_DIEs()
        if die.tag == "DW_TAG_inlined_subroutine" and _covers(debug, die, address)
    ]
    for die in reversed(inlined):  # children come after their parents
        file, line = (
            die.attributes[f"DW_AT_call_{what}"].value for what in ("file", "line")
        )
        yield _name(program, file, line)


def _row(program: LineProgram, address: int) -> tuple[int, int] | None:
    """File number and line of an address."""
    before = None
    for entry in program.get_entries():
        state = entry.state
        if state is None:
            continue
        if before and before.address <= address < state.address:
            return before.file, before.line
        before = None if state.end_sequence else state
    return None


def _covers(debug: DWARFInfo, die: DIE, address: int) -> bool:
    at = die.attributes
    if "DW_AT_low_pc" in at:
        low, high = at["DW_AT_low_pc"].value, at["DW_AT_high_pc"]
        end = high.value if high.form == "DW_FORM_addr" else low + high.value
        return low <= address < end
    ranges = debug.range_lists()
    if "DW_AT_ranges" not in at or ranges is None:
        return False
    base = die.cu.get_top_DIE().attributes["DW_AT_low_pc"].value
    for entry in ranges.get_range_list_at_offset(at["DW_AT_ranges"].value, die.cu):
        if isinstance(entry, BaseAddressEntry):
            base = entry.base_address
            continue
        start = 0 if getattr(entry, "is_absolute", False) else base
        if start + entry.begin_offset <= address < start + entry.end_offset:
            return True
    return False


def _name(program: LineProgram, file: int, line: int) -> str:
    header = program.header
    first = 0 if header.version >= 5 else 1
    entry = header.file_entry[file - first]
    folders = [b"", *header.include_directory]
    if header.version >= 5:
        folders = folders[1:]
    folder = folders[entry.dir_index] if entry.dir_index < len(folders) else b""
    return f"{folder.decode()}/{entry.name.decode()}:{line}"
