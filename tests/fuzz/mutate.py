"""How inputs are made odd, by kind: from real inputs, and from values that code tends to overlook."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

Bytes = bytes
Mutator = Callable[[Random, list[bytes]], bytes]

ODD = json.loads(Path(__file__).with_name("odd.json").read_text("ascii"))  # values that code tends to overlook
NUMBERS: list[Any] = [None, True, False, -1, 0, 1, 2, 63, 64, 0.5, -0.0, 1e-320, 1e300, 1e308]
NUMBERS += [(1 << bits) - low for bits in (31, 33, 62, 63, 64) for low in (0, 1)] + [10**18, 10**30, 10**400]
NUMBERS += [float("nan"), float("inf"), float("-inf")]
TEXTS: list[str] = [*ODD["texts"], "x" * 300, "9" * 5000, "(" * 200]
CHUNKS = [text.encode("utf-8", "surrogatepass") for text in TEXTS] + [
    *(b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 2000, b'{"a":' * 500, b"\0" * 64),
]


def odd(rng: Random) -> Any:
    """A value that code tends to overlook."""
    what = rng.randrange(8)
    if what < 3:
        return rng.choice(NUMBERS)
    if what < 6:
        return rng.choice(TEXTS)
    plain: list[Any] = [[], {}, [[]], [0], [1], {"a": 1}, {"file": 0, "start": 0, "length": 1}]
    return copy.deepcopy(rng.choice([*plain, {"file": 0, "offsets": [0], "sizes": [1]}, [rng.choice(NUMBERS)]]))


# ---- bytes, trees ----------------------------------------------------------------------------------------------------


def of_bytes(rng: Random, seeds: list[Bytes]) -> Bytes:
    """One to three changes of bytes anywhere."""
    data = rng.choice(seeds)
    for _ in range(rng.randint(1, 3)):
        at = rng.randint(0, len(data))
        end = min(at + rng.choice([0, 1, 1, 2, 8, 64]), len(data))
        what = rng.randrange(6)
        if what == 0:
            data = data[:at]
        elif what == 1:  # another seed's end
            other = rng.choice(seeds)
            data = data[:at] + other[rng.randint(0, len(other)) :]
        elif what == 2 and data:
            data = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        elif what == 3:
            data = data[:at] + data[at:end] * 2 + data[end:]
        elif what == 4:
            data = data[:at] + data[end:]
        else:
            data = data[:at] + rng.choice(CHUNKS) + data[end:]
    return data


def of_tree(rng: Random, tree: Any) -> None:
    """One change of a dict or list, in place."""
    nodes = [tree]
    for node in nodes:
        inner = node.values() if isinstance(node, dict) else node
        nodes += [child for child in inner if isinstance(child, dict | list)]
    node = rng.choice([n for n in nodes if n] or [tree])
    if not node:
        return
    key = rng.choice(sorted(node) if isinstance(node, dict) else range(len(node)))
    what = rng.randrange(7)
    if what in (0, 6):
        node[key] = odd(rng)
    elif what == 1 and isinstance(node[key], int):
        node[key] += rng.choice([-1, 1, 64, -64, 1 << 61])
    elif what == 2:
        del node[key]
    elif what == 3 and isinstance(node, list):
        node.append(copy.deepcopy(node[key]))
    elif what == 4 and isinstance(node, dict):
        node[rng.choice(["a", "b", "", key + "x", "files", "sources"])] = copy.deepcopy(node[key])
    else:
        node[key] = copy.deepcopy(rng.choice(nodes))  # a copy of the whole inside a part of it is allowed


def of_json(rng: Random, seeds: list[Bytes]) -> Bytes:
    """A change of the JSON tree, or of the bytes where they are no JSON."""
    try:
        tree = json.loads(rng.choice(seeds))
        if not isinstance(tree, dict | list) or rng.random() < 0.2:
            raise ValueError
    except (ValueError, RecursionError):
        return of_bytes(rng, seeds)
    for _ in range(rng.choice([1, 1, 2])):
        of_tree(rng, tree)
    return _text(rng, tree)


def _text(rng: Random, tree: Any) -> Bytes:
    return json.dumps(tree, separators=(",", ":"), ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def of_header(rng: Random, seeds: list[Bytes]) -> Bytes:
    """The header of a safetensors file: a length, JSON, two bytes for the size of the rest."""
    seed = rng.choice(seeds)
    text = of_json(rng, [seed[8:-2]])
    text = text.ljust(-(-(len(text) + 8) // 64) * 64 - 8)
    return (len(text).to_bytes(8, "little") if rng.random() < 0.9 else seed[:8]) + text + seed[-2:]


# ---- run folders -----------------------------------------------------------------------------------------------------


def of_rows(rng: Random, seeds: list[Bytes]) -> Bytes:
    """Change some lines, or the file's one object. The line with the file's name stays."""
    name, _, content = rng.choice(seeds).partition(b"\n")
    if not name.endswith(b".jsonl"):
        return name + b"\n" + of_json(rng, [content])
    lines = content.split(b"\n")
    others = [line for seed in seeds for line in seed.split(b"\n")[1:3]]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        what = rng.randrange(6)
        if what == 0:
            lines.insert(at, rng.choice(lines + others))
        elif what == 1:
            lines[at] = of_bytes(rng, [lines[at]])
        elif what == 2:
            lines.insert(at, rng.choice([*CHUNKS, b"[1,2]", b"null", b"1", b'""', b" ", b"{}"]))
        else:
            lines[at] = of_json(rng, [lines[at]])
    return name + b"\n" + b"\n".join(lines)


def of_manifest(tree: Any) -> Mutator:
    """Changes of one place of a manifest: another value, or the value of another place."""
    places = list(_places(tree, ()))
    by_last: dict[Any, list[Any]] = {}
    for at, value in places:
        by_last.setdefault(at[-1], []).append((at, value))

    def mutate(rng: Random, seeds: list[Bytes]) -> Bytes:
        if rng.random() < 0.15:
            return of_json(rng, seeds)
        changes = []
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            at, value = rng.choice(rng.choice(list(by_last.values())))
            node = [copy.deepcopy(value)]
            of_tree(rng, node)
            new = node[0] if node and rng.random() < 0.5 else odd(rng)
            if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
                new = value + rng.choice([-1, 1, 2, 64])
            changes.append({"at": [*at], "value": new})
        return _text(rng, changes)

    return mutate


def _places(node: Any, at: tuple[Any, ...]) -> Any:
    if at:
        yield at, node
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, inner in items:
        yield from _places(inner, (*at, key))


def of_entries(rng: Random, seeds: list[Bytes]) -> Bytes:
    """A few entries that are made, moved, made unreadable or removed."""
    if rng.random() < 0.15:
        return of_bytes(rng, seeds)
    lines = rng.choice(seeds).split(b"\n") if rng.random() < 0.3 else []
    return b"\n".join([*lines, *(json.dumps(_step(rng)).encode() for _ in range(rng.randint(1, 4)))])


def _step(rng: Random) -> list[str]:
    name = f"checkpoints/{rng.choice(ODD['names'])}"
    which = rng.random()
    if which < 0.3:
        name = rng.choice(ODD["places"])
    elif which < 0.5:
        name = f"checkpoints/{rng.choice(ODD['names'][:3])}/{rng.choice(ODD['inner'])}"
    what = rng.choice(["folder", "file", "pipe", "link", "link", "copy", "move", "closed", "gone"])
    if what == "link":
        return [what, name, rng.choice(ODD["targets"])]
    if what == "copy":
        return [what, f"checkpoints/{rng.choice(ODD['names'][:2])}", name]
    if what == "move":
        return [what, rng.choice([f"checkpoints/{rng.choice(ODD['names'][:2])}", rng.choice(ODD["places"])]), name]
    if what == "file":
        return [what, name, rng.choice(["", "{}", "[]", "null", "x", '{"step": 4}'])]
    return [what, name]


# ---- what a person types ---------------------------------------------------------------------------------------------


@cache
def _keys() -> list[str]:
    from configs.explain import all_keys

    return [key.replace("*", "0") for key in all_keys()]


@cache
def _text_keys() -> list[str]:
    """The keys that accept any text, so that odd texts reach the config."""
    from configs.config import Config
    from configs.typed import options_at

    return [key for key in _keys() if str in options_at(Config, key.split("."))]


@cache
def _last_words() -> set[bytes]:
    return {key.rpartition(".")[2].encode() for key in _text_keys()}


def _value(rng: Random) -> str:
    what = rng.randrange(6)
    if what == 0:
        return str(rng.choice(NUMBERS))
    if what == 1:
        return str(rng.choice([1, 2, 8, 16, 0.1, 1.0, 2.0, "true", "fsdp", "cosine", "bf16", "x", "[a, b]", "[0, 1]"]))
    if what == 2:
        return rng.choice("'\"") + rng.choice(TEXTS) + rng.choice("'\"")
    if what == 3:
        return f"[{', '.join(rng.choice(TEXTS) for _ in range(rng.randint(0, 3)))}]"
    return "".join(rng.choice(TEXTS) for _ in range(rng.choice([1, 1, 2])))


def of_config(rng: Random, seeds: list[Bytes]) -> Bytes:
    """Lines of a config with another value, or twice, moved or further indented; or any change of bytes."""
    if rng.random() < 0.3:
        return of_bytes(rng, seeds)
    lines = rng.choice(seeds).split(b"\n")
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(lines))
        text_lines = [
            n for n, line in enumerate(lines) if b": " in line and line.split(b":")[0].strip() in _last_words()
        ]
        at = rng.choice(text_lines) if text_lines and rng.random() < 0.4 else at
        name, colon, _ = lines[at].partition(b":")
        what = rng.randrange(8)
        if what < 4 and colon:
            before = rng.choice([b"", b"", b"", b"!!str ", b"&a ", b"!!int ", b"| ", b">-\n    "])
            lines[at] = name + b": " + before + _value(rng).encode("utf-8", "surrogatepass")
        elif what == 4:
            lines.insert(at, rng.choice(lines))
        elif what == 5:
            lines[at] = rng.choice([b"  ", b" ", b"\t", b"- ", b"? "]) + lines[at]
        elif what == 6:
            lines.insert(at, rng.choice([b"include: demo", b"include: [demo, x]", b"a: &a [1, *a]", b"<<: *a", b"---"]))
        else:
            del lines[at]
            lines = lines or [b""]
    return b"\n".join(lines)


def of_overrides(rng: Random, seeds: list[Bytes]) -> Bytes:
    """Words with keys of the schema and odd values; lists for `--array`, and files of such lists."""
    if rng.random() < 0.15:
        return of_bytes(rng, seeds)
    words = [_word(rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    which = rng.random()
    if which < 0.2:
        items = ",".join(_value(rng) for _ in range(rng.randint(0, 4)))
        words = [f"--array {words[0].partition('=')[0]}=[{items}]"]
    elif which < 0.35:
        text = rng.choice(["\n", "\n", "\r\n", "\n\n", "\n#x\n", "\x0c", " "]).join(words)
        return b"@" + rng.choice([b"", b"", b"\xef\xbb\xbf"]) + text.encode("utf-8", "surrogatepass")
    return b"\0".join(word.encode("utf-8", "surrogatepass").replace(b"\0", b"") for word in words)


def _word(rng: Random) -> str:
    if rng.random() < 0.05:
        return rng.choice(["--debug", "--print-config", "--", "-x", "--train.steps", "--config", "demo", "=", "x"])
    key = rng.choice(_text_keys() if rng.random() < 0.5 else _keys())
    if rng.random() < 0.1:
        key += rng.choice(["x", ".0", ".-1", ".٣", ".", ".9999999999", " ", "\udcff", ".a.b"])
    return f"{key}={_value(rng)}"


def of_environment(rng: Random, seeds: list[Bytes]) -> Bytes:
    """Variables that we read, with odd texts, and files about the number of processors."""
    if rng.random() < 0.15:
        return of_bytes(rng, seeds)
    from trainer.host.environment import VARIABLES

    pairs = rng.choice(seeds).split(b"\0") if rng.random() < 0.6 else []
    for _ in range(rng.choice([1, 1, 2, 4])):
        which = rng.random()
        if which < 0.2:
            name = rng.choice(sorted(ODD["processors"]))
            text = rng.choice([*ODD["processors"][name], *TEXTS])
        else:
            name = rng.choice([*sorted(VARIABLES), "CUDA_VISIBLE_DEVICES", "MUSTER_CLOCK"])
            text = rng.choice([*ODD["times"], *ODD["devices"], *TEXTS, "1", "2", "0"])
        word = f"{name}={text}".encode("utf-8", "surrogatepass").replace(b"\0", b"")
        if pairs and rng.random() < 0.5:
            pairs[rng.randrange(len(pairs))] = word
        else:
            pairs.append(word)
    return b"\0".join(pairs)
