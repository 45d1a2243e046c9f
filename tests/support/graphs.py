"""MLX's own graph of lazy arrays, read from what `mx.export_to_dot` writes."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass

import mlx.core as mx

_NODE = re.compile(r'\{ (\d+) \[label ="([^"]+)"')
_TO_NODE = re.compile(r'"(\w+)" -> (\d+)')
_FROM_NODE = re.compile(r'(\d+) -> "(\w+)"')


@dataclass(frozen=True)
class Graph:
    """The operations that arrays are made of and that have not been evaluated.

    The number of an operation is the same in every graph that it is in.

    Attributes:
        labels: of each operation, such as ``Matmul``.
        inputs: the operations whose results it takes.
        last: those that give the arrays.
    """

    labels: dict[str, str]
    inputs: dict[str, set[str]]
    last: set[str]

    @classmethod
    def of(cls, *arrays: mx.array) -> Graph:
        text = io.StringIO()
        mx.export_to_dot(text, *arrays)
        dot = text.getvalue()
        made_by = {array: node for node, array in _FROM_NODE.findall(dot)}
        inputs: dict[str, set[str]] = {node: set() for node, _ in _NODE.findall(dot)}
        used = set()
        for array, node in _TO_NODE.findall(dot):
            used.add(array)
            if array in made_by:
                inputs[node].add(made_by[array])
        last = {node for array, node in made_by.items() if array not in used}
        return cls(dict(_NODE.findall(dot)), inputs, last)

    def named(self, *labels: str) -> set[str]:
        """The operations whose label has one of these words in it."""
        return {
            n for n, label in self.labels.items() if any(w in label for w in labels)
        }

    def before(self, *nodes: str) -> set[str]:
        """All that some operations need, themselves included."""
        found: set[str] = set()
        todo = list(nodes)
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += self.inputs[node]
        return found
