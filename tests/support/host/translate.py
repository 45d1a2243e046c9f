"""Metal source as MLX generates it -> a C++ translation unit."""

from __future__ import annotations

import re

from .build import CompileError

# What Metal forbids and a C++ compiler would let pass.
RULES = [
    (r"\bstd::", "Metal has metal::, not std::"),
    (r"\blong\s+long\b", "Metal has no long long"),
    (r"\bgoto\b", "Metal has no goto"),
    (r"\bnew\b|\bdelete\b", "Metal has no dynamic memory"),
    (r"\bdouble\b", "Metal has no double"),
    (r"\b(virtual|dynamic_cast|typeid|throw|try|catch)\b", "not in Metal"),
    (r"\bthread_local\b|\basm\b", "not in Metal"),
    (r"#\s*include\s*<(?!metal)", "only <metal_*> headers exist"),
    (r"#\s*include\s*\"", "MLX compiles one text: nothing can be included by path"),
]

_VECTORS = {
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "threads_per_grid",
    "threadgroups_per_grid",
}
_CONSTANTS = {"thread_execution_width": "32u", "threads_per_simdgroup": "32u"}

# `threadgroup T a[..], b[..];` but no pointer, reference or parameter.
_GROUP_DECLARATION = re.compile(r"\bthreadgroup\s+((?:[^;(){}*&=\[\]]|\[[^\];]*\])+);")
_DECLARATOR = re.compile(r"\s*(\w+)\s*((?:\[[^\]]*\]\s*)*)$", re.S)


def check_rules(source: str) -> None:
    """Raises CompileError for what is C++ and not Metal."""
    code = _without_comments(source)
    if not code.isascii():
        raise CompileError(
            "MLX hands the source over as ASCII; found another character"
        )
    for pattern, reason in RULES:
        if match := re.search(pattern, code):
            line = code[: match.start()].count("\n") + 1
            raise CompileError(f"{reason}: {match[0]!r} in line {line}")


def translate(function: str, source: str, lint: bool = False) -> tuple[str, list[str]]:
    """Makes a generated kernel compilable as C++.

    Args:
        function: the kernel function's name.
        source: the text that MLX would hand to the Metal compiler, without MLX's own
            preamble.
        lint: for `lint.lint`: declarations only, no entry point.

    Returns:
        The translation unit, and the names of the buffers in their order.
    """
    source, instance = _cut_instantiation(_without_comments(source))
    start = source.index(f"[[kernel]] void {function}(\n")
    end = source.index(") {\n", start) + len(") {\n")
    header, signature, body = source[:start], source[start:end], source[end:]
    parameters = signature.split("(\n", 1)[1].removesuffix(") {\n").split(",\n")
    arguments, buffers = [], []
    for parameter in parameters:
        if found := re.match(r"\s*(.*?)\s*([*&])\s*(\w+) \[\[buffer", parameter):
            type_, kind, name = found.groups()
            dereference = "*" if kind == "&" else ""
            arguments.append(f"{dereference}({type_}*)b[{len(buffers)}]")
            buffers.append(name)
        else:
            found = re.match(r"\s*\w+ (\w+) \[\[", parameter)
            assert found is not None, f"cannot read the parameter {parameter!r}"
            arguments.append(_attribute(found[1]))
    utils = '#include "mlx/backend/metal/kernels/utils.h"\n'
    text = (
        '#include "msl.h"\n'
        + ("" if lint else utils)
        + "#define double MSL_METAL_HAS_NO_double\n"
        + f'#line 1 "{function}.header"\n'
        + _group_arrays(header, lint)
        + "\n"
        + signature
        + f'#line 1 "{function}.metal"\n'
        + _group_arrays(body, lint)
    )
    call = instance or function
    if lint:
        text += f"\nauto msl_instance = &{call};\n" if instance else ""
        return text, buffers
    text += (
        f'\n#line 1 "{function}.entry"\n'
        'extern "C" __attribute__((no_sanitize("thread"), no_sanitize("undefined")))\n'
        "void msl_entry(void** b, const msl_thread* t) {\n"
        f"  (void)b; (void)t; {call}({', '.join(arguments)});\n}}\n"
    )
    return text, buffers


def _without_comments(source: str) -> str:
    """The same lines, without what is no code."""
    comment = r"//[^\n]*|/\*.*?\*/"
    return re.sub(comment, lambda m: "\n" * m[0].count("\n"), source, flags=re.S)


def _cut_instantiation(source: str) -> tuple[str, str | None]:
    """The source without ``template [[host_name(..)]]``, and what that instantiates."""
    found = re.search(r"\ntemplate \[\[host_name\(\"[^\n]*\n?$", source)
    if found is None:
        return source, None
    instance = re.search(r"decltype\((.*)\) ", found[0])
    assert instance is not None
    return source[: found.start()] + "\n", instance[1]


def _attribute(name: str) -> str:
    if name in _VECTORS:
        return f"uint3(t->{name}[0], t->{name}[1], t->{name}[2])"
    return _CONSTANTS.get(name, f"t->{name}")


def _group_arrays(code: str, lint: bool) -> str:
    """Turns declarations of threadgroup arrays into requests to the runner.

    A name of its own for every array gives it guard pages and a place in messages. The
    rewritten text keeps its lines.
    """

    def rewrite(match: re.Match[str]) -> str:
        first, *others = _split(match[1])
        head = re.match(r"\s*(.+?)\s*\b(\w+\s*(?:\[[^\]]*\]\s*)*)$", first, re.S)
        assert head is not None, f"cannot read {match[0]!r}"
        type_ = head[1].strip()
        lines = []
        for declarator in [head[2], *others]:
            found = _DECLARATOR.match(declarator)
            assert found is not None, f"cannot read {match[0]!r}"
            name, sizes = found.groups()
            if lint:
                lines.append(f"extern threadgroup {type_} {name}{sizes};")
                continue
            lines.append(
                f"using {name}__type = {type_} {sizes}; "
                f"auto& {name} = *reinterpret_cast<{name}__type*>(msl_group_array("
                f'"{name}", __LINE__, sizeof({name}__type), sizeof({type_})));'
            )
        return " ".join(lines).replace("\n", " ") + "\n" * match[0].count("\n")

    return _GROUP_DECLARATION.sub(rewrite, code)


def _split(declarators: str) -> list[str]:
    """Splits at the commas that are in no brackets."""
    parts, depth = [""], 0
    for character in declarators:
        depth += (character in "[<") - (character in "]>")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
