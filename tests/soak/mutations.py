"""Valid files, made invalid in the ways that hand editing, other programs, broken disks and bad intentions have."""

import contextlib
import copy
import json
import pickle
import random
import struct
from typing import Any

NASTY: list[Any] = [
    *(
        None,
        True,
        False,
        "",
        "x",
        "\u0000",
        "🙂" * 50,
        "a" * 100_000,
        "../../etc/passwd",
        "os:system",
        "__import__('os')",
    ),
    *(0, -1, 1, 2, 33, 2**31, 2**53, 2**63, 2**64, 10**30, -(10**30), 10**400),
    *(0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
    *([], {}, [[]], [None], [[1, 2], [3]], {"": {}}, [0] * 10_000, {"a": {"a": {"a": {}}}}),
    *("(a+)+$=8,8", "(.*)*x=8,8", "a{4000000000}=8,8", "[=8,8", "(" * 500 + "=8,8", "conv=w4+", "8,8", "3", "2,3,4"),
]
TEXTS = ["NaN", "1e999", "-1e999", "9" * 5000, "[" * 100_000, '{"a":' * 50_000, "// no", "'", "\ufeff", "\\ud800", ","]


def deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any, found: list[tuple[Any, Any]] | None = None) -> list[tuple[Any, Any]]:
    """(container, key) of every item in a JSON value."""
    found = [] if found is None else found
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            places(value[key], found)
    return found


def mutated_value(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to three items replaced, deleted, renamed, repeated or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        spots = places(value)
        if not spots:
            return rng.choice(NASTY)
        holder, key = rng.choice(spots)
        kind = rng.randrange(8)
        if kind <= 2:
            holder[key] = copy.deepcopy(rng.choice(NASTY))
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            other, at = rng.choice(spots)
            holder[key] = (
                copy.deepcopy(other[at]) if at in other or (isinstance(other, list) and at < len(other)) else None
            )
        elif kind == 5:
            if isinstance(holder, list):
                holder.extend(copy.deepcopy(holder[key]) for _ in range(rng.choice([1, 2, 300])))
            else:
                holder[rng.choice(["", "extra", "bits", "path", "format", str(key) + " "])] = holder.pop(key)
        elif kind == 6:
            item = holder[key]
            number = isinstance(item, (int, float)) and not isinstance(item, bool)
            holder[key] = [item] if rng.random() < 0.3 else str(item) if number or rng.random() < 0.5 else {"x": item}
        else:
            item = holder[key]
            if isinstance(item, (int, float)) and not isinstance(item, bool):
                holder[key] = rng.choice([-item, item + 1, item * 10**9, item * 1.5, float(item), item / 3])
            else:
                holder[key] = deep(rng.choice([3, 50, 900]))
    return value


def mutated_text(text: str, rng: random.Random) -> bytes:
    """Bytes of a text that was cut, flipped, doubled, or had something put in."""
    content, kind = bytearray(text.encode()), rng.randrange(7)
    at = rng.randrange(len(content) + 1)
    if kind == 0:
        return bytes(content[:at])
    if kind == 1:
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        content[at:at] = rng.choice(
            [b"\xff", b"\xc3", b"\x00", b"\xed\xa0\x80", bytes(rng.randrange(256) for _ in range(20))]
        )
    elif kind == 3:
        content[at:at] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    elif kind == 4:
        content += bytes(content)
    elif kind == 5:
        other = rng.randrange(len(content) + 1)
        del content[min(at, other) : max(at, other)]
    else:  # a key that stands twice
        start = text.find('"', at)
        end = text.find(",", start)
        if 0 <= start < end:
            content[start:start] = content[start : end + 1]
    return bytes(content)


def json_file(value: Any, rng: random.Random) -> bytes:
    """A mutated JSON file: mostly of its values, else of its text."""
    if rng.random() < 0.7:
        with contextlib.suppress(RecursionError):  # nested deeper than Python itself can write
            return json.dumps(mutated_value(value, rng)).encode("utf-8", "surrogatepass")
    return mutated_text(json.dumps(value), rng)


# ---- pickles ------------------------------------------------------------------------------------------------------

_STOP = b"."
# Programs in pickle's language, most of them harmful; {canary} is a file that none may make.
PROGRAMS = [
    b"cos\nsystem\n(S'touch {canary}'\ntR.",
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x10touch {canary}\x85R.",
    b'c__builtin__\neval\n(S\'open("{canary}","w")\'\ntR.',
    b"(i__main__\nsystem\n.",
    b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
    b"\x80\x02}q\x00(X\x06\x00\x00\x00weighth\x00u.",  # a dictionary that holds itself
    b"\x80\x04(" + b"]" * 5000 + b"e" * 4999 + b".",
    b"(" * 100_000 + b"t" * 100_000 + _STOP,
    b"]" + b"]a" * 3 + _STOP,
    b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a bytearray of 2^63 bytes
    b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fx.",
    b"\x80\x02\x8b\xff\xff\xff\x7f.",  # a whole number of 2^31 bytes
    b"I" + b"9" * 100_000 + b"\n.",
    b"}r\xff\xff\xff\x7f.",  # memo number 2^31
    b"p4294967295\n.",
    b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff}.",
    b"\x82\x01.",
    b"P1\n.",
    b"Nb.",
    b"",
    b"\x80",
]


def pickle_file(value: Any, rng: random.Random, canary: str) -> bytes:
    """A mutated pickle: of its value, its bytes, or with one of PROGRAMS in it or in its place."""
    kind = rng.randrange(4)
    protocol = rng.randrange(6)
    if kind == 0:
        return pickle.dumps(mutated_value(value, rng), protocol)
    program = rng.choice(PROGRAMS).replace(b"{canary}", canary.encode())
    if kind == 1:
        return program
    content = bytearray(pickle.dumps(value, protocol))
    if kind == 2:
        at = rng.randrange(len(content))
        content[at:at] = program[: rng.randrange(len(program) + 1)]
        return bytes(content)
    for _ in range(rng.randint(1, 6)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content[: rng.randint(1, len(content))] if rng.random() < 0.3 else content)


# ---- safetensors --------------------------------------------------------------------------------------------------


def split_safetensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, the tensors' bytes)."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined_safetensors(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def safetensors_file(content: bytes, rng: random.Random, signed) -> bytes:
    """A mutated packed model. signed(header, data) -> the header with a checksum that is right again: whoever means ill
    computes it."""
    header, data = split_safetensors(content)
    kind = rng.randrange(6)
    if kind <= 2:  # what the metadata say, under a right checksum
        meta = header["__metadata__"]
        name = rng.choice(["layers", "layers", "layers", "config"])
        text = json.dumps(mutated_value(json.loads(meta[name]), rng)) if rng.random() < 0.8 else None
        meta[name] = text if text is not None else mutated_text(meta[name], rng).decode("utf-8", "replace")
        if rng.random() < 0.2:
            key = rng.choice(list(meta))
            meta[key] = str(rng.choice(NASTY))[:1000]
        return joined_safetensors(signed(header, data), data)
    if kind == 3:  # tensors of other names, types and shapes, under a right checksum
        names = [name for name in header if name != "__metadata__"]
        name = rng.choice(names)
        entry = header[name]
        change = rng.randrange(3)
        if change == 0:
            header[rng.choice([name + "x", "", rng.choice(names)])] = header.pop(name)
        elif change == 1:
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            entry["dtype"], entry["shape"] = rng.choice([("U8", [size]), ("I8", [size, 1]), ("BOOL", [1, size])])
        else:
            entry["shape"] = [*entry["shape"], 1]
        return joined_safetensors(signed(header, data), data)
    if kind == 4:
        broken = bytearray(content)
        for _ in range(rng.randint(1, 6)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        return bytes(broken[: rng.randrange(len(broken))] if rng.random() < 0.5 else broken)
    size = rng.choice([0, 1, 7, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
    return struct.pack("<Q", size) + rng.choice(
        [content[8:], b"{" * 1000, json.dumps(mutated_value(header, rng)).encode()]
    )
