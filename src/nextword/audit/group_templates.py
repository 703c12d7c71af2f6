"""A person's own groups and the sentences that their words are put into, in any language, from one YAML file.

    groups:                # each a name, and its word for every slot
      women: {person: woman, they: she}
      men:   {person: man, they: he}
    templates:
      - The {person} said that {they} was a doctor.
      - text: "{they:capitalize} works as a"          # or a list of texts
        continuations: [nurse, engineer]
        instead: {men: "He is employed as a"}         # a group's own text, where words alone do not do

A slot's value may be a list of words, as many in each group: the first stands beside the first, the second beside the second.
Slots may stand in continuations too, for languages in which these agree. `delimiter` is what stands before a continuation (a
space).
Of the file nothing but its texts is taken: no tag makes an object, no alias is followed, and "no" is a word.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from nextword.common.errors import MissingExtra, UsageError
from nextword.data.decoding import reason
from nextword.tasks.schema import listed

LARGEST, DEEPEST = 2**18, 8  # bytes of such a file, and lists in lists: reading takes their product
SCALARS = {"str", "int", "float", "bool", "null", "timestamp", "merge", "value"}  # YAML's guesses; all are texts here
TAG = "tag:yaml.org,2002:"

Entry = tuple[Any, Any]  # a key's node and its value's


class Sentence(NamedTuple):
    """A template with the words of each group in it, and with what may follow, by what stands in the file for it. `place` is
    that of the words in their lists."""

    template: str
    place: int
    texts: dict[str, str]
    continuations: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Groups:
    """The groups of a file.

    Attributes:
        names: in the file's order.
        words: of each slot the word of every group, once for each place of a list.
        sentences: each template as often as its lists have places.
        delimiter: what stands before a continuation.
    """

    path: Path
    names: tuple[str, ...]
    words: tuple[dict[str, str], ...]
    sentences: tuple[Sentence, ...]
    delimiter: str

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(combinations(self.names, 2))

    def swap(self, one: str, other: str) -> Callable[[str], str]:
        """What puts the words of one group in the place of the other's in a text, and the other's in the place of the one's.

        Whole words, upper case as it was. A word of several slots (her: his, him) is taken for the first that has it.
        """
        table: dict[str, tuple[str, str]] = {}
        for words in self.words:
            for mine, theirs in ((words[one], words[other]), (words[other], words[one])):
                if mine.strip() and mine.lower() != theirs.lower():
                    table.setdefault(mine.lower(), (mine, theirs))
        if not table:
            return lambda text: text
        longest = sorted(table, key=len, reverse=True)
        pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest))})(?!\w)", re.IGNORECASE)

        def word(match: re.Match[str]) -> str:
            found = match[0]
            written, new = table.get(found.lower(), (found, found))
            if found == written:
                return new
            if found.isupper() and len(found) > 1:
                return new.upper()
            return new[:1].upper() + new[1:] if found[:1].isupper() else new

        return lambda text: pattern.sub(word, text)


def read_groups(path: Path) -> Groups:
    """The groups and sentences of a file.

    Raises:
        UsageError: no such file, or something in it is wrong, by its line.
        MissingExtra: there is no package here that reads YAML.
    """
    root = _composed(path)
    file = _File(path)
    entries = file.mapping(root, "the file", ("groups", "templates", "delimiter"), ("groups", "templates"))
    words, places = _words(file, entries["groups"])
    delimiter = file.text(entries["delimiter"][1], "delimiter", blank=True) if "delimiter" in entries else " "
    filling = _Filling(file, {name: entry[0] for name, entry in file.mapping(entries["groups"][1]).items()}, words)
    sentences = tuple(
        sentence for node in file.items(entries["templates"][1], "templates")
        for sentence in _sentences(file, filling, node, places)
    )  # fmt: skip
    slots = list(dict.fromkeys(slot for group in words.values() for slot in group))
    rows = [
        {name: group[slot][place] for name, group in words.items()}
        for slot in slots if all(slot in group for group in words.values())
        for place in range(max(len(group[slot]) for group in words.values()))
    ]  # fmt: skip
    return Groups(path, tuple(words), tuple(rows), sentences, delimiter)


# ---------------------------------------------------------------- the file


def _composed(path: Path) -> Any:
    """The file's root node."""
    try:
        import yaml
    except ImportError as error:
        raise MissingExtra(f"{path}: YAML", "audit") from error
    try:
        if path.stat().st_size > LARGEST:
            raise UsageError(f"{path}: more than {LARGEST:,} bytes, which no file of groups needs")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise UsageError(f"{path} line {line}: the alias *{event.anchor}: write out what it stands for")
            if depth > DEEPEST:
                raise UsageError(f"{path} line {line}: nested deeper than a file of groups is")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{where}: not YAML: {error.problem}") from error
    except OSError as error:
        raise UsageError(f"{path}: {reason(error)}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # an escape beyond Unicode is a ValueError
        raise UsageError(f"{path}: not YAML in UTF-8: {reason(error).splitlines()[0]}") from error


class _File:
    """Reads the nodes of a file; whatever is wrong is told by the line that it stands in."""

    def __init__(self, path: Path):
        self.path = path

    def wrong(self, node: Any, what: str) -> UsageError:
        line = node.start_mark.line + 1 if node is not None else 1
        return UsageError(f"{self.path} line {line}: {what}")

    def mapping(
        self, node: Any, what: str = "it", known: tuple[str, ...] = (), needed: tuple[str, ...] = ()
    ) -> dict[str, Entry]:
        """The entries of a mapping by their keys; where `known` are given, no others."""
        self._check(node, "map", f"{what} must be a mapping, NAME: VALUE")
        entries: dict[str, Entry] = {}
        for key, value in node.value:
            name = self.text(key, "a key")
            if name in entries:
                raise self.wrong(key, f"{name} stands twice")
            if known and name not in known:
                raise self.wrong(key, f"{what} has {name[:40]!r}, which is none of: {', '.join(known)}")
            entries[name] = (key, value)
        if missing := [name for name in needed if name not in entries]:
            raise self.wrong(node, f"{what} says no {missing[0]}")
        return entries

    def items(self, node: Any, what: str) -> list[Any]:
        self._check(node, "seq", f"{what} must be a list")
        if not node.value:
            raise self.wrong(node, f"{what}: the list is empty")
        return node.value

    def text(self, node: Any, what: str, blank: bool = False) -> str:
        """A text; with `blank` it may be empty, in quotation marks."""
        self._check(node, "str", f"{what} must be a text")
        if not (node.value.strip() or (blank and node.style in ("'", '"'))):
            raise self.wrong(node, f"{what} is empty")
        if re.search("[\ud800-\udfff]", node.value):
            raise self.wrong(node, f"{what} has half a surrogate pair, which is no character")
        return node.value

    def texts(self, node: Any, what: str, blank: bool = False) -> list[str]:
        """A text, or a list of texts."""
        nodes = self.items(node, what) if node is not None and node.tag == f"{TAG}seq" else [node]
        return [self.text(one, what, blank) for one in nodes]

    def _check(self, node: Any, kind: str, what: str) -> None:
        if node is None:
            raise self.wrong(node, "the file is empty" if what.startswith("the file") else what)
        tag = node.tag.removeprefix(TAG)
        if tag not in SCALARS | {"map", "seq"}:
            raise self.wrong(node, f"the tag {'!!' if node.tag.startswith(TAG) else ''}{tag}: only texts are read here")
        if (tag if tag in ("map", "seq") else "str") != kind or isinstance(node.value, list) != (kind != "str"):
            raise self.wrong(node, what)


# ---------------------------------------------------------------- groups and sentences


def _words(file: _File, entry: Entry) -> tuple[dict[str, dict[str, list[str]]], int]:
    """Of every group the words of its slots, each as often as the lists are long (one word for every place); and how long."""
    groups: dict[str, dict[str, list[str]]] = {}
    length, first = 1, ""
    found = file.mapping(entry[1], "groups")
    for name, (_, node) in found.items():
        groups[name] = {}
        for slot, (key, value) in file.mapping(node, f"the group {name}").items():
            words = groups[name][slot] = file.texts(value, f"{name}: {slot}", blank=True)
            if len(words) > 1 and length not in (1, len(words)):
                raise file.wrong(key, f"{name}: {slot} has {len(words)} words, and {first} has {length}")
            if len(words) > 1 and length == 1:
                length, first = len(words), f"{name}: {slot}"
    if len(groups) < 2:
        raise file.wrong(entry[0], "one group has none to be compared with: name two or more")
    return groups, length


def _sentences(file: _File, filling: "_Filling", node: Any, places: int) -> Iterator[Sentence]:
    """A template's sentences: one, or one for each place of the lists of words that it asks for."""
    entries = {"text": (node, node)}
    if node.tag == f"{TAG}map":
        entries = file.mapping(node, "a template", ("text", "continuations", "instead"), ("text",))
    instead = file.mapping(entries["instead"][1], "instead", tuple(filling.groups)) if "instead" in entries else {}
    own = {name: file.text(value, f"instead of {name}'s") for name, (_, value) in instead.items()}
    after = file.texts(entries["continuations"][1], "continuations") if "continuations" in entries else []
    for text in file.texts(entries["text"][1], "a template"):
        seen: list[Sentence] = []
        for place in range(places):
            made = Sentence(
                text, place, {name: filling(own.get(name, text), name, place, node) for name in filling.groups},
                {one: {name: filling(one, name, place, node) for name in filling.groups} for one in after},
            )  # fmt: skip
            if all(made[2:] != other[2:] for other in seen):
                seen.append(made)
        if all(len(set(one.texts.values())) == 1 for one in seen):
            raise file.wrong(node, f"says the same of every group: {text!r} has no slot such as {{{filling.slots[0]}}}")
        yield from seen


class _Filling:
    """Puts a group's words into a template."""

    def __init__(self, file: _File, keys: dict[str, Any], words: dict[str, dict[str, list[str]]]):
        self.file, self.keys, self.words = file, keys, words
        self.groups = list(words)
        self.slots = list(dict.fromkeys(slot for group in words.values() for slot in group)) or ["slot"]

    def __call__(self, text: str, group: str, place: int, node: Any) -> str:
        parts = []
        try:
            pieces = list(Formatter().parse(text))
        except ValueError as error:
            raise self.file.wrong(node, f"{text!r} is not well formed: {error}") from error
        for literal, slot, change, conversion in pieces:
            parts.append(literal)
            if slot is None:
                continue
            if conversion or change not in ("", "capitalize"):
                raise self.file.wrong(node, f"in {text!r}: write {{{slot}}} or {{{slot}:capitalize}}")
            word = self._word(slot, group, place, node)
            parts.append(word[:1].upper() + word[1:] if change else word)
        return "".join(parts)

    def _word(self, slot: str, group: str, place: int, node: Any) -> str:
        if slot not in self.slots:
            raise self.file.wrong(node, f"{{{slot}}} is no slot that a group has a word for: {listed(self.slots)}")
        if slot not in self.words[group]:
            needed = f"which the template in line {node.start_mark.line + 1} needs"
            raise self.file.wrong(self.keys[group], f"the group {group} has no word for {{{slot}}}, {needed}")
        words = self.words[group][slot]
        return words[place % len(words)]
