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

from nextword.common.errors import MissingDependencyError, UsageError
from nextword.data.issues import error_text
from nextword.tasks.schema import join_names

MAX_FILE_BYTES, MAX_NESTING_DEPTH = 2**18, 8  # bytes of such a file, and lists in lists: reading takes their product
YAML_SCALAR_TAGS = {
    "str",
    "int",
    "float",
    "bool",
    "null",
    "timestamp",
    "merge",
    "value",
}  # YAML's guesses; all are texts here
YAML_TAG_PREFIX = "tag:yaml.org,2002:"

KeyValueNodes = tuple[Any, Any]  # a key's node and its value's


class TemplateSentence(NamedTuple):
    """A template with the words of each group in it, and with what may follow, by what stands in the file for it. `place` is
    that of the words in their lists."""

    template: str
    word_index: int
    texts: dict[str, str]
    continuations: dict[str, dict[str, str]]


@dataclass(frozen=True)
class GroupTemplates:
    """The groups of a file.

    Attributes:
        names: in the file's order.
        words: of each slot the word of every group, once for each place of a list.
        sentences: each template as often as its lists have places.
        delimiter: what stands before a continuation.
    """

    path: Path
    names: tuple[str, ...]
    slot_words: tuple[dict[str, str], ...]
    sentences: tuple[TemplateSentence, ...]
    delimiter: str

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(combinations(self.names, 2))

    def make_swapper(self, group_a: str, group_b: str) -> Callable[[str], str]:
        """What puts the words of one group in the place of the other's in a text, and the other's in the place of the one's.

        Whole words, upper case as it was. A word of several slots (her: his, him) is taken for the first that has it.
        """
        replacements: dict[str, tuple[str, str]] = {}
        for words in self.slot_words:
            for source_word, target_word in ((words[group_a], words[group_b]), (words[group_b], words[group_a])):
                if source_word.strip() and source_word.lower() != target_word.lower():
                    replacements.setdefault(source_word.lower(), (source_word, target_word))
        if not replacements:
            return lambda text: text
        longest_first = sorted(replacements, key=len, reverse=True)
        pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)

        def replace_word(match: re.Match[str]) -> str:
            matched = match[0]
            spelling, replacement = replacements.get(matched.lower(), (matched, matched))
            if matched == spelling:
                return replacement
            if matched.isupper() and len(matched) > 1:
                return replacement.upper()
            return replacement[:1].upper() + replacement[1:] if matched[:1].isupper() else replacement

        return lambda text: pattern.sub(replace_word, text)


def read_group_templates(path: Path) -> GroupTemplates:
    """The groups and sentences of a file.

    Raises:
        UsageError: no such file, or something in it is wrong, by its line.
        MissingExtra: there is no package here that reads YAML.
    """
    root = _compose_yaml(path)
    reader = _NodeReader(path)
    entries = reader.mapping(root, "the file", ("groups", "templates", "delimiter"), ("groups", "templates"))
    words, num_word_indices = _read_slot_words(reader, entries["groups"])
    delimiter = reader.string(entries["delimiter"][1], "delimiter", allow_blank=True) if "delimiter" in entries else " "
    filler = _TemplateFiller(
        reader, {name: entry[0] for name, entry in reader.mapping(entries["groups"][1]).items()}, words
    )
    sentences = tuple(
        sentence for node in reader.sequence(entries["templates"][1], "templates")
        for sentence in _expand_template(reader, filler, node, num_word_indices)
    )  # fmt: skip
    slots = list(dict.fromkeys(slot for group in words.values() for slot in group))
    rows = [
        {name: group[slot][place] for name, group in words.items()}
        for slot in slots if all(slot in group for group in words.values())
        for place in range(max(len(group[slot]) for group in words.values()))
    ]  # fmt: skip
    return GroupTemplates(path, tuple(words), tuple(rows), sentences, delimiter)


# ---------------------------------------------------------------- the file


def _compose_yaml(path: Path) -> Any:
    """The file's root node."""
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(f"{path}: YAML", "audit") from error
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path}: more than {MAX_FILE_BYTES:,} bytes, which no file of groups needs")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise UsageError(f"{path} line {line}: the alias *{event.anchor}: write out what it stands for")
            if depth > MAX_NESTING_DEPTH:
                raise UsageError(f"{path} line {line}: nested deeper than a file of groups is")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        location = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{location}: not YAML: {error.problem}") from error
    except OSError as error:
        raise UsageError(f"{path}: {error_text(error)}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # an escape beyond Unicode is a ValueError
        raise UsageError(f"{path}: not YAML in UTF-8: {error_text(error).splitlines()[0]}") from error


class _NodeReader:
    """Reads the nodes of a file; whatever is wrong is told by the line that it stands in."""

    def __init__(self, path: Path):
        self.path = path

    def error_at(self, node: Any, message: str) -> UsageError:
        line = node.start_mark.line + 1 if node is not None else 1
        return UsageError(f"{self.path} line {line}: {message}")

    def mapping(
        self,
        node: Any,
        description: str = "it",
        allowed_keys: tuple[str, ...] = (),
        required_keys: tuple[str, ...] = (),
    ) -> dict[str, KeyValueNodes]:
        """The entries of a mapping by their keys; where `known` are given, no others."""
        self._check_node(node, "map", f"{description} must be a mapping, NAME: VALUE")
        entries: dict[str, KeyValueNodes] = {}
        for key, value in node.value:
            name = self.string(key, "a key")
            if name in entries:
                raise self.error_at(key, f"{name} stands twice")
            if allowed_keys and name not in allowed_keys:
                raise self.error_at(
                    key, f"{description} has {name[:40]!r}, which is none of: {', '.join(allowed_keys)}"
                )
            entries[name] = (key, value)
        if missing := [name for name in required_keys if name not in entries]:
            raise self.error_at(node, f"{description} says no {missing[0]}")
        return entries

    def sequence(self, node: Any, description: str) -> list[Any]:
        self._check_node(node, "seq", f"{description} must be a list")
        if not node.value:
            raise self.error_at(node, f"{description}: the list is empty")
        return node.value

    def string(self, node: Any, description: str, allow_blank: bool = False) -> str:
        """A text; with `blank` it may be empty, in quotation marks."""
        self._check_node(node, "str", f"{description} must be a text")
        if not (node.value.strip() or (allow_blank and node.style in ("'", '"'))):
            raise self.error_at(node, f"{description} is empty")
        if re.search("[\ud800-\udfff]", node.value):
            raise self.error_at(node, f"{description} has half a surrogate pair, which is no character")
        return node.value

    def strings(self, node: Any, description: str, allow_blank: bool = False) -> list[str]:
        """A text, or a list of texts."""
        nodes = self.sequence(node, description) if node is not None and node.tag == f"{YAML_TAG_PREFIX}seq" else [node]
        return [self.string(one, description, allow_blank) for one in nodes]

    def _check_node(self, node: Any, expected_tag: str, message: str) -> None:
        if node is None:
            raise self.error_at(node, "the file is empty" if message.startswith("the file") else message)
        tag = node.tag.removeprefix(YAML_TAG_PREFIX)
        if tag not in YAML_SCALAR_TAGS | {"map", "seq"}:
            raise self.error_at(
                node, f"the tag {'!!' if node.tag.startswith(YAML_TAG_PREFIX) else ''}{tag}: only texts are read here"
            )
        if (tag if tag in ("map", "seq") else "str") != expected_tag or isinstance(node.value, list) != (
            expected_tag != "str"
        ):
            raise self.error_at(node, message)


# ---------------------------------------------------------------- groups and sentences


def _read_slot_words(reader: _NodeReader, entry: KeyValueNodes) -> tuple[dict[str, dict[str, list[str]]], int]:
    """Of every group the words of its slots, each as often as the lists are long (one word for every place); and how long."""
    groups: dict[str, dict[str, list[str]]] = {}
    length, first_list = 1, ""
    group_entries = reader.mapping(entry[1], "groups")
    for name, (_, node) in group_entries.items():
        groups[name] = {}
        for slot, (key, value) in reader.mapping(node, f"the group {name}").items():
            words = groups[name][slot] = reader.strings(value, f"{name}: {slot}", allow_blank=True)
            if len(words) > 1 and length not in (1, len(words)):
                raise reader.error_at(key, f"{name}: {slot} has {len(words)} words, and {first_list} has {length}")
            if len(words) > 1 and length == 1:
                length, first_list = len(words), f"{name}: {slot}"
    if len(groups) < 2:
        raise reader.error_at(entry[0], "one group has none to be compared with: name two or more")
    return groups, length


def _expand_template(
    reader: _NodeReader, filler: "_TemplateFiller", node: Any, num_word_indices: int
) -> Iterator[TemplateSentence]:
    """A template's sentences: one, or one for each place of the lists of words that it asks for."""
    entries = {"text": (node, node)}
    if node.tag == f"{YAML_TAG_PREFIX}map":
        entries = reader.mapping(node, "a template", ("text", "continuations", "instead"), ("text",))
    override_entries = (
        reader.mapping(entries["instead"][1], "instead", tuple(filler.groups)) if "instead" in entries else {}
    )
    overrides = {name: reader.string(value, f"instead of {name}'s") for name, (_, value) in override_entries.items()}
    continuations = reader.strings(entries["continuations"][1], "continuations") if "continuations" in entries else []
    for text in reader.strings(entries["text"][1], "a template"):
        unique_sentences: list[TemplateSentence] = []
        for word_index in range(num_word_indices):
            sentence = TemplateSentence(
                text, word_index, {name: filler(overrides.get(name, text), name, word_index, node) for name in filler.groups},
                {one: {name: filler(one, name, word_index, node) for name in filler.groups} for one in continuations},
            )  # fmt: skip
            if all(sentence[2:] != other[2:] for other in unique_sentences):
                unique_sentences.append(sentence)
        if all(len(set(one.texts.values())) == 1 for one in unique_sentences):
            raise reader.error_at(
                node, f"says the same of every group: {text!r} has no slot such as {{{filler.slots[0]}}}"
            )
        yield from unique_sentences


class _TemplateFiller:
    """Puts a group's words into a template."""

    def __init__(self, reader: _NodeReader, group_keys: dict[str, Any], words: dict[str, dict[str, list[str]]]):
        self.reader, self.group_keys, self.words = reader, group_keys, words
        self.groups = list(words)
        self.slots = list(dict.fromkeys(slot for group in words.values() for slot in group)) or ["slot"]

    def __call__(self, text: str, group: str, word_index: int, node: Any) -> str:
        parts = []
        try:
            template_fields = list(Formatter().parse(text))
        except ValueError as error:
            raise self.reader.error_at(node, f"{text!r} is not well formed: {error}") from error
        for literal, slot, format_spec, conversion in template_fields:
            parts.append(literal)
            if slot is None:
                continue
            if conversion or format_spec not in ("", "capitalize"):
                raise self.reader.error_at(node, f"in {text!r}: write {{{slot}}} or {{{slot}:capitalize}}")
            word = self._lookup_word(slot, group, word_index, node)
            parts.append(word[:1].upper() + word[1:] if format_spec else word)
        return "".join(parts)

    def _lookup_word(self, slot: str, group: str, word_index: int, node: Any) -> str:
        if slot not in self.slots:
            raise self.reader.error_at(
                node, f"{{{slot}}} is no slot that a group has a word for: {join_names(self.slots)}"
            )
        if slot not in self.words[group]:
            requirement = f"which the template in line {node.start_mark.line + 1} needs"
            raise self.reader.error_at(
                self.group_keys[group], f"the group {group} has no word for {{{slot}}}, {requirement}"
            )
        words = self.words[group][slot]
        return words[word_index % len(words)]
