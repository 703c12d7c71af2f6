"""Groups and sentence templates written by the user, in any language, from a YAML file.

    groups:                # each group's word for every slot
      women: {person: woman, they: she}
      men:   {person: man, they: he}
    templates:
      - The {person} said that {they} was a doctor.
      - text: "{they:capitalize} works as a"          # or a list of texts
        continuations: [nurse, engineer]
        instead: {men: "He is employed as a"}         # the text of one group, if words alone are not enough

A slot may have a list of words, of the same length in every group: words at the same index correspond to one another. Slots may
occur in continuations too, for languages with agreement. `delimiter` separates a text from its continuation (default: a space).
The file is read as text only: no tag constructs an object, no alias is followed, and `no` is a word.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from nextword.common.errors import UsageError, import_optional
from nextword.data.issues import error_text
from nextword.tasks.schema import join_names

MAX_FILE_BYTES, MAX_NESTING_DEPTH = 2**18, 8  # parsing time grows with their product
YAML_TAG_PREFIX = "tag:yaml.org,2002:"
YAML_TAGS = {
    "mapping": {"map"},
    "sequence": {"seq"},
    "scalar": {
        "str",
        "int",
        "float",
        "bool",
        "null",
        "timestamp",
        "merge",
        "value",
    },  # guesses of YAML: all are read as text
}

Key = tuple[str | int, ...]  # mapping keys and list indices from the root of a file


class TemplateSentence(NamedTuple):
    """A template filled in for every group.

    Attributes:
        template: the text in the file.
        word_index: the index into lists of words.
        texts: the sentence by group.
        continuations: by continuation in the file, then by group.
    """

    template: str
    word_index: int
    texts: dict[str, str]
    continuations: dict[str, dict[str, str]]


@dataclass(frozen=True)
class GroupTemplates:
    """The groups and sentences of a file.

    Attributes:
        names: the groups, in the order of the file.
        slot_words: corresponding words by group, one dictionary per slot and index.
        sentences: every template, once per index of the lists of words in it.
        delimiter: text between a sentence and its continuation.
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
        """A function that exchanges the words of two groups in a text.

        It replaces whole words and keeps their case. A word of several slots (her: his, him) is replaced as in the first of
        them.
        """
        replacements: dict[str, tuple[str, str]] = {}
        for words in self.slot_words:
            for source, target in ((words[group_a], words[group_b]), (words[group_b], words[group_a])):
                if source.strip() and source.lower() != target.lower():
                    replacements.setdefault(source.lower(), (source, target))
        if not replacements:
            return lambda text: text
        alternatives = "|".join(map(re.escape, sorted(replacements, key=len, reverse=True)))
        pattern = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)

        def replace(match: re.Match[str]) -> str:
            word = match[0]
            source, target = replacements.get(word.lower(), (word, word))
            if word == source:
                return target
            if word.isupper() and len(word) > 1:
                return target.upper()
            return _capitalize(target) if word[:1].isupper() else target

        return lambda text: pattern.sub(replace, text)


def read_group_templates(path: Path) -> GroupTemplates:
    """Read groups and templates from a YAML file.

    Raises:
        UsageError: the file does not exist or is invalid, with the line.
        MissingDependencyError: PyYAML is not installed.
    """
    source = _YAMLSource(path)
    source.mapping((), ("groups", "templates", "delimiter"), required=("groups", "templates"))
    delimiter = source.strings(("delimiter",), allow_blank=True)[0] if ("delimiter",) in source.values else " "
    words, num_words = _read_slot_words(source)
    filler = _TemplateFiller(source, words)
    sentences = tuple(
        sentence
        for i in range(len(source.sequence(("templates",))))
        for sentence in _expand_template(source, filler, ("templates", i), num_words)
    )
    slot_words = tuple(
        {name: slots[slot][index % len(slots[slot])] for name, slots in words.items()}
        for slot in filler.slots
        if all(slot in slots for slots in words.values())
        for index in range(max(len(slots[slot]) for slots in words.values()))
    )
    return GroupTemplates(path, tuple(words), slot_words, sentences, delimiter)


# ---------------------------------------------------------------- the file


class _YAMLSource:
    """A YAML file as dictionaries, lists and strings, with the line of every value."""

    def __init__(self, path: Path):
        self.path = path
        self.lines: dict[Key, int] = {}
        self.values: dict[Key, Any] = {}
        node = _compose_yaml(path)
        if node is None:
            raise self.error((), "the file is empty")
        self._add(node, ())

    def error(self, key: Key, message: str) -> UsageError:
        where = ".".join(map(str, key))
        return UsageError(f"{self.path} line {self.lines.get(key, 1)}: {where}{': ' if where else ''}{message}")

    def _add(self, node: Any, key: Key) -> Any:
        """Convert a node to plain values, checking what no file may contain."""
        self.lines.setdefault(key, node.start_mark.line + 1)
        tag = node.tag.removeprefix(YAML_TAG_PREFIX)
        if tag not in YAML_TAGS[node.id]:
            raise self.error(
                key, f"the tag {'!!' if tag != node.tag else ''}{tag} is not supported: values are plain text"
            )
        value: Any = {}
        if node.id == "scalar":
            value = node.value
            if not value.strip() and node.style not in ("'", '"'):
                raise self.error(key, "is empty")
            if re.search("[\ud800-\udfff]", value):
                raise self.error(key, "has half a surrogate pair, which is not a character")
        elif node.id == "sequence":
            value = [self._add(child, (*key, i)) for i, child in enumerate(node.value)]
        else:
            for name_node, child in node.value:
                name = str(self._add(name_node, key))
                self.lines[*key, name] = name_node.start_mark.line + 1
                if name in value:
                    raise self.error((*key, name), "is defined twice")
                value[name] = self._add(child, (*key, name))
        self.values[key] = value
        return value

    def sequence(self, key: Key) -> list[Any]:
        return self._typed(key, list, "a list")

    def _typed(self, key: Key, kind: type, description: str) -> Any:
        value = self.values[key]
        if not isinstance(value, kind):
            raise self.error(key, f"must be {description}")
        if not value:
            raise self.error(key, "is empty")
        return value

    def mapping(self, key: Key, allowed: Sequence[str] = (), required: Sequence[str] = ()) -> dict[str, Any]:
        """The mapping at a key. With `allowed`, other names in it are refused."""
        values = self._typed(key, dict, "a mapping, NAME: VALUE")
        if allowed and (unknown := [name for name in values if name not in allowed]):
            raise self.error((*key, unknown[0]), f"unknown key; choose from {join_names(allowed)}")
        if missing := [name for name in required if name not in values]:
            raise self.error(key, f"{missing[0]} is missing")
        return values

    def strings(self, key: Key, allow_blank: bool = False) -> list[str]:
        """A string or a list of strings at a key. With `allow_blank` they may be empty, in quotation marks."""
        values = self.sequence(key) if isinstance(self.values[key], list) else [self.values[key]]
        for value in values:
            if not isinstance(value, str):
                raise self.error(key, "must be text")
            if not (allow_blank or value.strip()):
                raise self.error(key, "is empty")
        return values


def _compose_yaml(path: Path) -> Any:
    """The root node of a file, None if it is empty."""
    yaml = import_optional("yaml", f"{path}: YAML", "audit")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                raise UsageError(f"{path} line {line}: the alias *{event.anchor} is not supported; repeat the value")
            if depth > MAX_NESTING_DEPTH:
                raise UsageError(f"{path} line {line}: nested more than {MAX_NESTING_DEPTH} levels deep")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line_text = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line_text}: not valid YAML: {error.problem}") from error
    except OSError as error:
        raise UsageError(f"{path}: {error_text(error)}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # an escape beyond Unicode is a ValueError
        raise UsageError(f"{path}: not valid YAML in UTF-8: {error_text(error).splitlines()[0]}") from error


# ---------------------------------------------------------------- groups and sentences


def _read_slot_words(source: _YAMLSource) -> tuple[dict[str, dict[str, list[str]]], int]:
    """The words of every group and slot, and the length of lists of words (1 without lists)."""
    groups: dict[str, dict[str, list[str]]] = {}
    length, first = 1, ""
    for name in source.mapping(("groups",)):
        groups[name] = {}
        for slot in source.mapping(("groups", name)):
            key = ("groups", name, slot)
            words = groups[name][slot] = source.strings(key, allow_blank=True)
            if len(words) > 1 and length not in (1, len(words)):
                raise source.error(key, f"has {len(words)} words, but {first} has {length}")
            if len(words) > 1 and length == 1:
                length, first = len(words), f"{name}.{slot}"
    if len(groups) < 2:
        raise source.error(("groups",), "define at least two groups to compare")
    return groups, length


def _expand_template(
    source: _YAMLSource, filler: "_TemplateFiller", key: Key, num_words: int
) -> Iterator[TemplateSentence]:
    """The sentences of a template: one per text, or one per text and index of the lists of words in it."""
    own_texts: dict[str, str] = {}
    continuations: list[str] = []
    text_key = key
    if isinstance(source.values[key], dict):
        entries = source.mapping(key, ("text", "continuations", "instead"), required=("text",))
        text_key = (*key, "text")
        if "instead" in entries:
            names = source.mapping((*key, "instead"), tuple(filler.words))
            own_texts = {name: source.strings((*key, "instead", name))[0] for name in names}
        if "continuations" in entries:
            continuations = source.strings((*key, "continuations"))
    for text in source.strings(text_key):
        sentences: list[TemplateSentence] = []
        for index in range(num_words):
            texts = {name: filler.fill(own_texts.get(name, text), name, index, key) for name in filler.words}
            endings = {c: {name: filler.fill(c, name, index, key) for name in filler.words} for c in continuations}
            if all((texts, endings) != (other.texts, other.continuations) for other in sentences):
                sentences.append(TemplateSentence(text, index, texts, endings))
        if all(len(set(sentence.texts.values())) == 1 for sentence in sentences):
            raise source.error(key, f"{text!r} is the same for every group: add a slot such as {{{filler.slots[0]}}}")
        yield from sentences


class _TemplateFiller:
    """Fills the slots of templates with the words of a group."""

    def __init__(self, source: _YAMLSource, words: dict[str, dict[str, list[str]]]):
        self.source, self.words = source, words
        self.slots = list(dict.fromkeys(slot for slots in words.values() for slot in slots)) or ["slot"]

    def fill(self, template: str, group: str, word_index: int, key: Key) -> str:
        """The template with the group's words at an index. `key` names the template in errors."""
        parts: list[str] = []
        try:
            fields = list(Formatter().parse(template))
        except ValueError as error:
            raise self.source.error(key, f"{template!r} is not well formed: {error}") from error
        for literal, slot, format_spec, conversion in fields:
            parts.append(literal)
            if slot is None:
                continue
            if conversion or format_spec not in ("", "capitalize"):
                raise self.source.error(key, f"in {template!r}: write {{{slot}}} or {{{slot}:capitalize}}")
            word = self._lookup_word(slot, group, word_index, key)
            parts.append(_capitalize(word) if format_spec else word)
        return "".join(parts)

    def _lookup_word(self, slot: str, group: str, word_index: int, key: Key) -> str:
        if slot not in self.slots:
            raise self.source.error(key, f"{{{slot}}} is not a slot of any group: choose from {join_names(self.slots)}")
        if slot not in self.words[group]:
            template = f"the template in line {self.source.lines[key]}"
            raise self.source.error(("groups", group), f"no word for {{{slot}}}, which {template} needs")
        words = self.words[group][slot]
        return words[word_index % len(words)]


def _capitalize(word: str) -> str:
    return word[:1].upper() + word[1:]
