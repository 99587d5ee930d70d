"""A saved cache whose header can be edited: JSON as a tree, well-formed or not, and tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any


class Pairs(list[Any]):
    """A JSON object as [key, value] lists, so that a key may come twice."""


class Raw(str):
    """JSON to be written as it stands: `json.dumps` can't nest 2,000 deep."""


class Text(list[Any]):
    """A JSON string that holds the JSON of its only item, as the metadata's "cache" does."""


def parse(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([key, x] for key, x in pairs))


def dump(node: Any) -> str:
    if isinstance(node, Raw):
        return str(node)
    if isinstance(node, Text):
        return encode_basestring_ascii(dump(node[0]))
    if isinstance(node, Pairs):
        return "{" + ",".join(f"{dump(key)}:{dump(x)}" for key, x in node) + "}"
    if isinstance(node, list):
        return "[" + ",".join(map(dump, node)) + "]"
    if isinstance(node, str):
        return encode_basestring_ascii(node)
    return str(node) if type(node) is int else json.dumps(node)


def slots(node: Any) -> Iterator[tuple[list[Any], int]]:
    """Every place of a value in a tree: (list it is in, index)."""
    if isinstance(node, list):
        for at, item in enumerate(node):
            yield node, at
            yield from slots(item[1] if isinstance(node, Pairs) else item)


def value_at(owner: list[Any], at: int) -> Any:
    return owner[at][1] if isinstance(owner, Pairs) else owner[at]


def put(owner: list[Any], at: int, value: Any) -> None:
    owner[at] = [owner[at][0], value] if isinstance(owner, Pairs) else value


def take(pairs: Pairs, key: str) -> Any:
    return next(value for name, value in pairs if name == key)


@dataclass
class Draft:
    """A file whose header can still be edited as a tree."""

    head: Any
    body: bytearray

    @classmethod
    def of(cls, data: bytes) -> Draft:
        size = 8 + int.from_bytes(data[:8], "little")
        head = parse(data[8:size])
        meta = take(head, "__metadata__")
        meta.sort(reverse=True)  # "magic" first: safetensors writes them in any order
        for pair in meta:
            if pair[0] == "cache":
                pair[1] = Text([parse(pair[1])])
        return cls(head, bytearray(data[size:]))

    @property
    def cache(self) -> Text:
        """The metadata's "cache": a root of a tree of its own."""
        found: Text = take(take(self.head, "__metadata__"), "cache")
        return found

    def tensors(self) -> dict[str, list[Any]]:
        """By name: [dtype, shape, bytes]."""
        found = {}
        for name, entry in self.head:
            if name != "__metadata__":
                content = self.body[slice(*take(entry, "data_offsets"))]
                found[name] = [take(entry, "dtype"), list(take(entry, "shape")), content]
        return found

    def set_tensors(self, tensors: dict[str, list[Any]]) -> None:
        self.head = Pairs(pair for pair in self.head if pair[0] == "__metadata__")
        self.body = bytearray()
        for name, (dtype, shape, content) in tensors.items():
            ends = [len(self.body), len(self.body) + len(content)]
            entry = Pairs([["dtype", dtype], ["shape", shape], ["data_offsets", ends]])
            self.head.append([name, entry])
            self.body += content

    def build(self) -> bytearray:
        text = dump(self.head).encode()
        text += b" " * (-len(text) % 8)
        return bytearray(len(text).to_bytes(8, "little") + text + self.body)
