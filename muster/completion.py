"""What a shell offers for a word of `muster ...`: verbs, presets, keys of the config and their values, options, files.

A shell asks at every Tab. To answer fast, this imports neither torch nor the schema: keys come from
`configs/schema.json`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from configs.presets import FOLDER, presets
from muster.verbs import VERBS
from trainer.host.arguments import Parser, typed
from trainer.host.terminal import say, say_exactly

SHELLS = ("bash", "zsh", "fish")
WORDS = {  # verbs that take one of a few words first
    "checkpoint": ("list", "show", "verify", "diff", "prune", "convert"),
    "cluster": ("up", "down", "status"),
    "completion": SHELLS,
}
_TAKE_CONFIG = ("train", "run", "submit")


_HELP = """Print a script that a shell reads at its start.
bash: eval "$(muster completion bash)" in ~/.bashrc; zsh: eval "$(muster completion zsh)" in ~/.zshrc, after compinit;
fish: muster completion fish > ~/.config/fish/completions/muster.fish"""


class Offer(NamedTuple):
    """Words to choose from. `files`: whether the files of the current folder belong to them."""

    words: list[str]
    files: bool = False


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog=typed("muster completion"), description=_HELP)
    parser.add_argument("shell", choices=SHELLS, metavar="bash|zsh|fish")
    say_exactly(_SCRIPTS[parser.parse_args(arguments).shell])
    return 0


def answer(arguments: list[str]) -> int:
    """What `muster complete WORD ...` runs, called by the scripts below. The last word is the one being typed."""
    found = offer(arguments[:-1], arguments[-1] if arguments else "")
    say("\n".join(["files" if found.files else "words", *found.words]))
    return 0


def offer(before: list[str], typed_so_far: str) -> Offer:
    """What the word that begins with `typed_so_far` may become, after the words `before`."""
    words, files = _offer(before, typed_so_far)
    return Offer(sorted({word for word in words if word.startswith(typed_so_far)}), files)


def _offer(before: list[str], start: str) -> tuple[list[str], bool]:
    verb = before[0] if before else None
    if verb not in VERBS:
        return ([*VERBS, "--help", "--version"], False) if verb is None else ([], False)
    if start.startswith("-"):
        return _options(VERBS[verb].main, [word for word in before[1:2] if word in WORDS.get(verb, ())]), False
    if verb in WORDS and len(before) == 1:
        return list(WORDS[verb]), False
    if verb not in _TAKE_CONFIG:
        return [], verb != "presets"
    key, equals, _ = start.partition("=")
    if equals:
        values = _values(key)
        return [f"{key}={value}" for value in values], not values
    has_config = any("=" not in word and not word.startswith("-") for word in before[1:])
    return [*_steps(start), *([] if has_config else presets())], not has_config


def _options(main_of_verb: str, words: list[str]) -> list[str]:
    """The options that `--help` of the verb lists."""
    from launch.verbs import main_of

    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(SystemExit):
        main_of(main_of_verb)([*words, "--help"])
    return re.findall(r"(?<![\w-])--?[a-z][\w-]*", told.getvalue())


# ---- keys ------------------------------------------------------------------------------------------------------------


def _steps(start: str) -> list[str]:
    """Keys one step longer than the typed text: `optim.` for `op`, `optim.lr=` for `optim.l`."""
    depth = start.count(".")
    found = []
    for key, _ in _keys():
        parts = key.split(".")
        if parts[:depth] == start.split(".")[:depth]:
            found.append(".".join(parts[: depth + 1]) + ("." if len(parts) > depth + 1 else "="))
    return found


def _values(key: str) -> list[str]:
    """The values of a key, where the key takes only a few."""
    kinds = [kind for name, found in _keys() if name == key for kind in found]  # several models have `model.norm`
    words = [str(word) for kind in kinds for word in (*kind.get("enum", ()), *_const(kind))]
    switches = ["true", "false"] if any(kind.get("type") == "boolean" for kind in kinds) else []
    return words + switches


def _const(kind: dict[str, Any]) -> list[Any]:
    return [kind["const"]] if "const" in kind else []


def _keys() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every key of a config, with the kinds of its values. For a list of sections, the keys of its first section."""
    schema = json.loads((FOLDER.parent / "schema.json").read_text("utf-8"))

    def below(properties: dict[str, Any], prefix: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
        for name, info in properties.items():
            kinds = [_resolved(kind, schema) for kind in info.get("anyOf", [info])]
            sections = [(kind["properties"], f"{prefix}{name}.") for kind in kinds if "properties" in kind]
            items = [_resolved(kind.get("items") or {}, schema) for kind in kinds]
            sections += [(item["properties"], f"{prefix}{name}.0.") for item in items if "properties" in item]
            for inner, longer in sections:
                yield from below(inner, longer)
            if not sections:
                yield prefix + name, kinds

    yield from below({k: v for k, v in schema["properties"].items() if k != "include"}, "")


def _resolved(kind: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    name = kind.get("$ref", "").rpartition("/")[2]
    return schema["$defs"][name] if name else kind


# ---- scripts ---------------------------------------------------------------------------------------------------------

_SCRIPTS = {
    # bash cuts words at `=` and `:`, and replaces only the part after the last one.
    "bash": r"""_muster() {
    local line=${COMP_LINE:0:COMP_POINT} typed kept value
    local -a words found
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    while [[ ${#words[@]} -gt 1 && ${words[0]} != "$1" ]]; do words=("${words[@]:1}"); done
    typed=${words[-1]}
    value=${typed##*[=:]}
    kept=${typed%"$value"}
    mapfile -t found < <("${1/#\~/$HOME}" complete "${words[@]:1}" 2>/dev/null)
    COMPREPLY=("${found[@]:1}")
    COMPREPLY=("${COMPREPLY[@]#"$kept"}")
    if [[ ${found[0]} == files ]]; then
        mapfile -t -O "${#COMPREPLY[@]}" COMPREPLY < <(compgen -f -- "$value")
        compopt -o filenames 2>/dev/null
    fi
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[.=] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -F _muster muster
""",
    "zsh": r"""#compdef muster
_muster() {
    local -a found=("${(@f)$(${~words[1]} complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    local files=$found[1]
    shift found
    compadd -S '' -- ${(M)found:#*[.=]}
    compadd -- ${found:#*[.=]}
    if [[ $files == files ]]; then
        compset -P '*='
        _files
    fi
}
compdef _muster muster
""",
    "fish": r"""function __muster_complete
    set -l words (commandline -opc)
    set -l typed (commandline -ct)
    set -l found ($words[1] complete $words[2..-1] "$typed" 2>/dev/null)
    printf '%s\n' $found[2..-1]
    if test "$found[1]" = files
        set -l value (string replace -r '^[^=]*=' '' -- "$typed")
        set -l kept (string sub -l (math (string length -- "$typed") - (string length -- "$value")) -- "$typed")
        for path in (__fish_complete_path "$value")
            printf '%s%s\n' "$kept" $path
        end
    end
end
complete -c muster -f -a '(__muster_complete)'
""",
}
