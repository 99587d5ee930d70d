"""What is done to saved caches: to their bytes, to the JSON in front, and to what they say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from math import prod
from typing import Any

from .drafts import Draft, Pairs, Raw, dump, parse, put, slots, take, value_at

SIZES = [0, 1, 2, 3, 5, 15, 16, 17, 24, 32, 48, 64, 96, 256, 1000, 2**16, 2**20, 2**24, 2**30,
         2**31 - 1, 2**31, 2**32, 2**40, 2**60, 2**62, 2**63 - 1]  # fmt: skip
VALUES = [
    *map(str, SIZES), *map(str, (-1, -16, -(2**31), -(2**63), 2**63, 2**64, 10**30)),
    "0.5", "1.0", "2.0", "16.0", "64.0", "1e308", "-1e308", "1e999", "NaN", "Infinity",
    "-Infinity", '"64"', '""', '"float16"', '"float64"', '"F16"', '"\\u0000"', '"\\ud800"',
    "[]", "[16]", "[[1,2],[3]]", "{}", '{"bits":8}', '{"":null}', "null", "true", "false", "",
    "[" * 2000 + "]" * 2000, '{"a":' * 2000 + "1" + "}" * 2000, "[" * 30000 + "]" * 30000,
    "9" * 5000, "1." + "0" * 5000, '"' + "x" * 100_000 + '"', "[" + "1," * 9999 + "1]",
]  # fmt: skip


# ------------------------------------------------------------------------------------- edits: bytes


def flip(rng: random.Random, data: bytearray) -> str:
    """Half of them in the header, and half of those in the metadata."""
    size = min(len(data), 8 + int.from_bytes(data[:8], "little"))
    text, done = data.find(b"data_offsets"), []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        kind = rng.random()
        most = len(data) if kind < 0.5 else size if kind < 0.75 or text < 0 else text
        old = data[at := rng.randrange(most)]
        # In JSON most bytes that aren't ASCII only test the parser; digits and quotes go further.
        new = rng.choice((old ^ (1 << rng.randrange(8)), rng.randrange(256), *b'0192"}],: '))
        data[at] = new
        done.append(f"{at}: {old:#x} -> {new:#x}")
    return "flip " + ", ".join(done)


def cut(rng: random.Random, data: bytearray) -> str:
    size = len(data)
    if rng.random() < 0.6:
        kept = rng.choice((rng.randrange(size), rng.randrange(min(size, 2000)), size - 1, 0, 8))
        del data[kept:]
        return f"cut {size} -> {kept}"
    more = rng.choice((1, 2, 8, 100, 5000))
    data += rng.randbytes(more) if rng.random() < 0.5 else bytes(more)
    if rng.random() < 0.3:  # a header that claims the whole file, and more
        claimed = rng.choice((size, len(data) + 1, 2**31, 2**63, 2**64 - 1))
        data[:8] = claimed.to_bytes(8, "little")
        return f"extend by {more}, header length {claimed}"
    return f"extend by {more}"


def ranges(rng: random.Random, data: bytearray) -> str:
    count = rng.choice((1, 4, 8, 64, 300))
    count = min(count, len(data) // 2)
    a, b = (rng.randrange(len(data) - count + 1) for _ in range(2))
    part, kind = data[a : a + count], rng.choice(("swap", "copy", "insert", "remove", "zero"))
    if kind == "swap":
        data[a : a + count], data[b : b + count] = data[b : b + count], part
    elif kind == "copy":
        data[b : b + count] = part
    elif kind == "insert":
        data[b:b] = part
    elif kind == "remove":
        del data[a : a + count]
    else:
        data[a : a + count] = bytes(count)
    return f"{kind} {count} bytes at {a}, {b}"


# -------------------------------------------------------------------------------------- edits: JSON


def edit_tree(rng: random.Random, draft: Draft) -> str:
    """A few values of the metadata's "cache" (mostly), or of the whole header."""
    roots, done = {"cache": draft.cache, "header": draft.head}, []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        where = "cache" if rng.random() < 0.65 else "header"
        found = list(slots(roots[where]))
        if found:
            done.append(f"{where} {_edit_value(rng, *rng.choice(found))}")
    return "; ".join(done)


def _edit_value(rng: random.Random, owner: list[Any], at: int) -> str:
    old, kind = value_at(owner, at), rng.random()
    name = str(owner[at][0] if isinstance(owner, Pairs) else at)[:40]
    if kind < 0.15 and isinstance(old, int):
        new: Any = rng.choice((old + 1, old - 1, 2 * old, -old, old // 2, old + 16, old - 16))
        put(owner, at, new)
    elif kind < 0.72 or not isinstance(owner, Pairs):
        put(owner, at, new := Raw(rng.choice(VALUES)))
    elif kind < 0.8:
        del owner[at]
        return f"{name} dropped"
    elif kind < 0.87:
        new = old if rng.random() < 0.4 else Raw(rng.choice(VALUES))
        owner.insert(rng.randrange(len(owner) + 1), [owner[at][0], new])
        return f"{name} twice: {dump(new)[:60]}"
    elif kind < 0.93:
        names = ["", "colour", "layers.9.k_data", "\ud800", *(pair[0] for pair in owner)]
        owner[at] = [new := rng.choice(names), old]
    else:
        name = rng.choice(("colour", "device", "kv_heads", "cls", "x" * 5000, "__class__"))
        owner.append([name, Raw(rng.choice(VALUES))])
        return f"added {name[:40]}: {owner[-1][1][:60]}"
    return f"{name}: {dump(old)[:60]} -> {dump(new)[:60]}"


def edit_magic(rng: random.Random, draft: Draft) -> str:
    """The metadata as a whole: what says that this is a cache at all."""
    meta = take(draft.head, "__metadata__")
    kind = rng.choice(("magic", "cache", "other", "more", "none"))
    value = rng.choice(VALUES)
    if kind == "magic":
        put(meta, 0, Raw(rng.choice(('"KVQUANT"', '"kvquant "', value))))
    elif kind == "cache":  # a string that is no JSON object
        meta[-1] = ["cache", value if rng.random() < 0.7 else Raw(value)]
    elif kind == "other":
        draft.head[0] = ["__metadata__", Raw(value)]
    elif kind == "more":
        meta += [[f"key{n}", "x" * rng.choice((0, 9))] for n in range(rng.choice((1, 900)))]
    else:
        del draft.head[0]
    return f"metadata: {kind} {value[:60]}"


# ----------------------------------------------------------------------------------- edits: tensors

BYTES = {"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
         "I32": 4, "F32": 4, "U32": 4, "I64": 8, "F64": 8, "U64": 8, "C64": 8, "F4": 1}  # fmt: skip


def edit_tensor(rng: random.Random, draft: Draft) -> str:
    """One tensor's dtype or shape in a file that stays well-formed, mostly with the same bytes."""
    tensors = draft.tensors()
    name = rng.choice(list(tensors))
    dtype, shape, content = tensors[name]
    kind = rng.choice(("dtype", "swap", "fold", "one", "flat", "less", "more", "bytes"))
    new, at = list(shape), rng.randrange(len(shape))
    if kind == "dtype":
        same = rng.random() < 0.6
        dtype = rng.choice([d for d, n in BYTES.items() if (n == BYTES[dtype]) == same])
        content = content if same else bytes(prod(shape) * BYTES[dtype])
    elif kind == "swap":
        rng.shuffle(new)
    elif kind == "fold" and len(new) > 1 and not new[at] % 2:
        new[at], new[at - 1] = new[at] // 2, new[at - 1] * 2
    elif kind == "one":
        new.insert(at, 1)
    elif kind == "flat":
        new = [prod(shape)]
    elif kind in ("less", "more"):
        new[at] = max(0, new[at] + (1 if kind == "more" else -1))
        content = (content + bytes(10**5))[: prod(new) * BYTES[dtype]]
    elif kind == "bytes":
        content = rng.randbytes(len(content))
    tensors[name] = [dtype, new, content]
    draft.set_tensors(tensors)
    return f"{name}: {kind} -> {dtype} {new}"


def edit_names(rng: random.Random, draft: Draft) -> str:
    """Tensors missing, too many, exchanged, or in another order in the file."""
    tensors = draft.tensors()
    a, b = (rng.choice(list(tensors)) for _ in range(2))
    kind = rng.choice(("remove", "exchange", "shuffle", "add", "layer", "many", "rename"))
    if kind == "remove":
        del tensors[a]
    elif kind == "exchange":
        tensors[a], tensors[b] = tensors[b], tensors[a]
    elif kind == "shuffle":  # as good as before
        tensors = dict(rng.sample(list(tensors.items()), len(tensors)))
    elif kind == "add":
        a = rng.choice(("", "x", "seq_starts", "layers.0.k_mean", "layers.2.k_data", "a" * 9999))
        tensors[a] = list(tensors[b])
    elif kind == "layer":
        new = f"layers.{rng.choice((2, '00', -1))}"
        tensors |= {n.replace("layers.0", new): x for n, x in tensors.items()}
    elif kind == "many":
        tensors |= {f"layers.{n}.k_data": ["U8", [0, 2**40], b""] for n in range(2, 600)}
    else:
        tensors[rng.choice((a.upper(), a + " ", a[1:], a + "\x00"))] = tensors.pop(a)
    draft.set_tensors(tensors)
    return f"names: {kind} {a[:40]} {b}"


def _ints(content: bytes, width: int) -> list[int]:
    parts = (content[at : at + width] for at in range(0, len(content), width))
    return [int.from_bytes(part, "little", signed=True) for part in parts]


def _packed(values: list[int], width: int) -> bytes:
    return b"".join((x % 256**width).to_bytes(width, "little") for x in values)


def edit_numbers(rng: random.Random, draft: Draft) -> str:
    """Lengths, padding or the format's numbers, and nothing that would go with them."""
    tensors = draft.tensors()
    name = rng.choice(("seq_lens", "seq_lens", "seq_starts", "format"))
    batch = tensors["seq_lens"][1][1]
    kept = name in tensors and (name != "seq_starts" or rng.random() < 0.9)
    dtype, shape, content = tensors.pop(name, ("I32", [batch], bytes(4 * batch)))
    values = _ints(content, BYTES[dtype])
    if kept or rng.random() < 0.8:
        for _ in range(rng.choice((1, 1, 2, 6))):
            at = rng.randrange(len(values))
            near = values[at] + rng.choice((-16, -1, 1, 16))
            values[at] = rng.choice((near, near, 0, -1, -(2**31), 2**31 - 1, 2**30, 97, 401))
        tensors[name] = [dtype, shape, _packed(values, BYTES[dtype])]
    draft.set_tensors(tensors)
    return f"{name}: {values if name in tensors else 'none'}"


def blank(rng: random.Random, sizes: dict[str, Any], group: int, most: int) -> dict[str, list[Any]]:
    """Tensors that hold together with a header's sizes; zeros behind each sequence's end.

    Where the sizes are absurd there are no tokens, and so no bytes: nothing else tells the lie.
    """
    layers, batch, heads, k_dim, v_dim = (sizes[name] for name in DIMENSIONS)
    fits = 0 <= layers <= 300 and 0 <= batch * layers <= 5000
    lens = [[rng.choice((0, rng.randint(0, most))) for _ in range(batch if fits else 0)]
            for _ in range(layers if fits else 3)]  # fmt: skip
    tokens = [max(of_layer, default=0) for of_layer in lens]
    if heads * (k_dim + v_dim + 8) * max(batch, 1) * sum(tokens) > 200_000:
        lens, tokens = [[0] * len(x) for x in lens], [0] * len(lens)
    said = sizes["format"]
    rotations = (int(said[f"{x}_rotation"]) for x in ("key", "value"))
    rows = [("int8", "int4").index(said[x]) for x in ("key", "value")] if "key" in said else [8]
    age = [int(said["by_age"])] if "by_age" in said else []
    format = [len(rows), *rows, next(rotations), group, next(rotations), *age]
    result = {"format": ["I64", [len(format)], _packed(format, 8)]}
    k_bytes, v_bytes = (
        dim // 2 if said.get(x) == "int4" else dim for x, dim in (("key", k_dim), ("value", v_dim))
    )
    result["seq_lens"] = ["I32", [layers, batch], _packed([n for x in lens for n in x], 4)]
    if rng.random() < 0.3 and fits:
        result["seq_starts"] = ["I32", [batch], bytes(4 * batch)]
    every = [("k_data", "U8", 1, k_bytes), ("k_params", "F16", 1, 2)]
    every += [("v_data", "U8", 1, v_bytes), ("v_params", "F16", 1, 2)]
    every += [("k_mean", "F16", group, k_dim)] * (group > 0)
    for layer, (of_layer, longest) in enumerate(zip(lens, tokens, strict=True)):
        for name, dtype, step, width in every:
            rows, content = -(-longest // step), b""
            for n in of_layer if longest else ():
                used = -(-n // step) * width * BYTES[dtype]
                content += (b"\x3c" * used).ljust(rows * width * BYTES[dtype], b"\0") * heads
            result[f"layers.{layer}.{name}"] = [dtype, [batch, heads, rows, width], content]
    return result


DIMENSIONS = ("num_layers", "batch_size", "num_kv_heads", "head_dim", "v_head_dim")


def edit_sizes(rng: random.Random, draft: Draft) -> str:
    """Sizes that header and tensors agree on: honest ones, absurd ones, or bytes nobody reads."""
    sizes: dict[str, Any] = json.loads(dump(draft.cache[0]))
    kind = rng.choice(("dirty", "honest", "absurd", "absurd", "absurd"))
    changed: dict[str, Any] = {}
    if kind == "absurd":
        names = (*DIMENSIONS, "max_seq_len", "block_size", "num_blocks", "key_mean")
        for name in rng.sample(names, rng.choice((1, 1, 2, 3))):
            size = rng.choice(SIZES)
            rounded = name in ("head_dim", "v_head_dim") and rng.random() < 0.8
            changed[name] = size // 16 * 16 if rounded else size
    elif kind == "honest":
        choices = ((1, 2, 7), (1, 2, 9), (1, 3, 8), (16, 48, 96), (16, 64))
        changed = {name: rng.choice(x) for name, x in zip(DIMENSIONS, choices, strict=True)}
    if "key_mean" in changed:
        sizes["format"]["key_mean"] = changed["key_mean"]
    sizes |= {name: x for name, x in changed.items() if name != "key_mean"}
    most = 0 if kind == "absurd" and rng.random() < 0.6 else 40
    tensors = blank(rng, sizes, sizes["format"]["key_mean"] or 0, most)
    if kind == "dirty":
        # Behind a sequence's end; a float16's -0.0 too, which is zero to everyone but a byte.
        zeros = [
            (n, at)
            for n, (_, _, x) in tensors.items()
            for at in (x.find(b"\0"), x.rfind(b"\0"), x.rfind(b"\0\0") + 1)
            if n.startswith("layers") and at > 0
        ]
        if zeros:
            name, at = rng.choice(zeros)
            content = bytearray(tensors[name][2])
            content[at] = rng.choice((0x80, 0x80, 1, 255))
            tensors[name][2] = bytes(content)
            changed[f"{name}[{at}]"] = content[at]
    draft.set_tensors(tensors)
    draft.cache[0] = parse(json.dumps(sizes))
    return f"sizes: {kind} {changed}, lengths up to {most}"


DRAFT_EDITS: dict[Callable[[random.Random, Draft], str], int] = {
    edit_tree: 34, edit_magic: 3, edit_tensor: 6, edit_names: 5, edit_numbers: 6, edit_sizes: 14
}  # fmt: skip
BYTE_EDITS: dict[Callable[[random.Random, bytearray], str], int] = {flip: 24, cut: 4, ranges: 4}
