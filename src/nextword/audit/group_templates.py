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

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

import regex

from nextword.common.errors import UsageError, import_optional
from nextword.common.text_units import UNSPACED, WORD_CHARACTER, nfc, script_of
from nextword.data.issues import SURROGATE, error_text, join_names

MAX_FILE_BYTES, MAX_NESTING_DEPTH = 2**18, 8  # parsing time grows with their product
# By script, what may stand before and after a word without a space: articles and prepositions, and Korean particles.
_AFFIXES = {
    "Hebrew": ("[והבכלמש]{0,3}", ""),
    "Arabic": ("[وف]?[بكل]?(?:ال|ل)?", ""),
    "Ethiopic": ("(?:እና)?[የበለከስ]?", ""),
    "Hangul": (
        "",
        r"들?(?:[은는이가을를의에와과도만로께]|에게|에서|으로|께서|한테|처럼|보다|이다|입니다|이고|였다|이었다)?",
    ),
}
YAML_TAG_PREFIX = "tag:yaml.org,2002:"
# Tags that YAML guesses for plain values. All scalars are read as text.
YAML_TAGS = {"map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value"}


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
        path: the file.
        names: the groups, in the order of the file.
        slot_words: corresponding words by group, one dictionary per slot and index.
        num_words: the length of lists of words; 1 without lists.
        sentences: every template, once per index of the lists of words in it.
        delimiter: text between a sentence and its continuation.
    """

    path: Path
    names: tuple[str, ...]
    slot_words: tuple[dict[str, str], ...]
    num_words: int
    sentences: tuple[TemplateSentence, ...]
    delimiter: str

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All pairs of groups."""
        return list(combinations(self.names, 2))

    def make_swapper(self, group_a: str, group_b: str, *, within: bool = False) -> Callable[[str], str]:
        """A function that exchanges the words of two groups in a text; with `within`, each with the next word of its own group.

        It replaces whole words and keeps their case and normalization form. Words of scripts without spaces are replaced
        wherever they occur; those of Hebrew, Arabic and Ethiopic also after prefixes, those of Korean before particles. A word
        of several slots (her: his, him) is replaced as in the first of them.
        """
        is_turkic = any(not {"ı", "İ"}.isdisjoint(word) for words in self.slot_words for word in words.values())
        replacements: dict[str, tuple[str, str]] = {}
        for i, words in enumerate(self.slot_words):
            other = self.slot_words[i + 1 if (i + 1) % self.num_words else i + 1 - self.num_words] if within else words
            for name, other_name in ((group_a, group_b), (group_b, group_a)):
                source, target = nfc(words[name]), nfc(other[name if within else other_name])
                if source.strip() and _fold(source, is_turkic) != _fold(target, is_turkic):
                    replacements.setdefault(_fold(source, is_turkic), (source, target))
        if not replacements:
            return lambda text: text
        sources = {source for source, _ in replacements.values()}
        forms = (
            sources | {_upper(source, is_turkic) for source in sources} | {_capitalize(s, is_turkic) for s in sources}
        )
        alternatives = sorted(map(_word_pattern, forms), key=len, reverse=True)
        pattern = regex.compile("|".join(alternatives), regex.V1 | regex.IGNORECASE)

        def replace(match: Any) -> str:
            word = match[0]
            source, target = replacements.get(_fold(word, is_turkic), (word, word))
            if word != source and word.isupper() and len(word) > 1:
                target = _upper(target, is_turkic)
            elif word != source and word[:1].isupper():
                target = _capitalize(target, is_turkic)
            return target

        def swap(text: str) -> str:
            composed = nfc(text)
            swapped: str = pattern.sub(replace, composed)
            if swapped == composed:
                return text
            is_nfd = text != composed and unicodedata.is_normalized("NFD", text)
            return unicodedata.normalize("NFD", swapped) if is_nfd else swapped

        return swap


def _word_pattern(word: str) -> str:
    """The pattern of a word that is not part of another word of its script."""
    prefix, suffix = _AFFIXES.get(script_of(word), ("", ""))
    before = "" if regex.match(UNSPACED, word, regex.V1) else rf"(?<=(?<!{WORD_CHARACTER}){prefix})"
    after = r"(?!\p{M})" if regex.match(UNSPACED, word[-1], regex.V1) else rf"(?={suffix}(?!{WORD_CHARACTER}))"
    return before + regex.escape(word) + after


def _fold(word: str, is_turkic: bool) -> str:
    """The key of a word whatever its case; Greek capitals have no accents."""
    folded = word.replace("I", "ı").replace("İ", "i") if is_turkic else word
    return _without_greek_accents(folded.casefold())


def _upper(word: str, is_turkic: bool) -> str:
    return _without_greek_accents((word.replace("i", "İ") if is_turkic else word).upper())


def _without_greek_accents(word: str) -> str:
    accents = regex.compile(r"(?<=\p{Greek})[\u0301\u0342\u0300]")
    return nfc(accents.sub("", unicodedata.normalize("NFD", word)))


def read_group_templates(path: Path) -> GroupTemplates:
    """Read groups and templates from a YAML file.

    Raises:
        UsageError: the file does not exist or is invalid, with the line.
        MissingDependencyError: PyYAML is not installed.
    """
    root = _read_yaml(path).mapping(("groups", "templates", "delimiter"), required=("groups", "templates"))
    delimiter = root["delimiter"].texts(allow_blank=True)[0] if "delimiter" in root else " "
    groups = root["groups"].mapping()
    if len(groups) < 2:
        raise root["groups"].error("define at least two groups to compare")
    filler = _TemplateFiller(groups)
    sentences = [sentence for entry in root["templates"].items() for sentence in _expand_template(entry, filler)]
    slot_words = tuple(
        {name: filler.word(slot, name, index) for name in groups}
        for slot in filler.slots
        if all(slot in slots for slots in filler.words.values())
        for index in range(filler.num_words)
    )
    return GroupTemplates(path, tuple(groups), slot_words, filler.num_words, tuple(sentences), delimiter)


# ---------------------------------------------------------------- the file


@dataclass(frozen=True)
class _Value:
    """A value in a YAML file.

    Attributes:
        path: the file.
        node: the parsed value, a `yaml.Node`.
        key: the keys and list indices that lead to it.
        line: its line in the file.
    """

    path: Path
    node: Any
    key: tuple[str, ...] = ()
    line: int = 1

    def error(self, message: str) -> UsageError:
        """An error that names the file, the line and the value."""
        return UsageError(f"{self.path} line {self.line}: {': '.join(filter(None, ('.'.join(self.key), message)))}")

    def mapping(self, allowed: Sequence[str] = (), required: Sequence[str] = ()) -> "dict[str, _Value]":
        """The values of a mapping by name. With `allowed`, other names are refused."""
        self._check("mapping", "a mapping, NAME: VALUE")
        values: dict[str, _Value] = {}
        for name_node, node in self.node.value:
            line = name_node.start_mark.line + 1
            name = _Value(self.path, name_node, self.key, line).text()
            value = _Value(self.path, node, (*self.key, name), line)
            if name in values:
                raise value.error("is defined twice")
            if allowed and name not in allowed:
                raise value.error(f"unknown key; choose from {join_names(allowed)}")
            values[name] = value
        if missing := [name for name in required if name not in values]:
            raise self.error(f"{missing[0]} is missing")
        return values

    def items(self) -> "list[_Value]":
        """The values of a list."""
        self._check("sequence", "a list")
        return [
            _Value(self.path, node, (*self.key, str(i)), node.start_mark.line + 1)
            for i, node in enumerate(self.node.value)
        ]

    def texts(self, allow_blank: bool = False) -> list[str]:
        """The strings of a list, or a single string."""
        if self.node.id != "sequence":
            return [self.text(allow_blank)]
        return [value.text(allow_blank) for value in self.items()]

    def text(self, allow_blank: bool = False) -> str:
        """A string. With `allow_blank` it may be blank, in quotation marks."""
        self._check("scalar", "text")
        text = self.node.value
        if not (text.strip() or (allow_blank and self.node.style in ("'", '"'))):
            raise self.error("is empty")
        if SURROGATE.search(text):
            raise self.error("has half a surrogate pair, which is not a character")
        return text

    def _check(self, kind: str, description: str) -> None:
        tag = self.node.tag.removeprefix(YAML_TAG_PREFIX)
        if tag not in YAML_TAGS:
            prefix = "!!" if tag != self.node.tag else ""
            raise self.error(f"the tag {prefix}{tag} is not supported: values are plain text")
        if self.node.id != kind:
            raise self.error(f"must be {description}")
        if kind != "scalar" and not self.node.value:
            raise self.error("is empty")


def _read_yaml(path: Path) -> _Value:
    """The root of a file."""
    yaml = import_optional("yaml", f"{path}: YAML", "audit")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UsageError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes")
        text = path.read_text(encoding="utf-8-sig")
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            value = _Value(path, event, line=event.start_mark.line + 1)
            if isinstance(event, yaml.AliasEvent):
                raise value.error(f"the alias *{event.anchor} is not supported; repeat the value")
            if depth > MAX_NESTING_DEPTH:
                raise value.error(f"nested more than {MAX_NESTING_DEPTH} levels deep")
        root = _Value(path, yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        line_text = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line_text}: not valid YAML: {error.problem}") from error
    except OSError as error:
        raise UsageError(f"{path}: {error_text(error)}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # an escape beyond Unicode is a ValueError
        raise UsageError(f"{path}: not valid YAML in UTF-8: {error_text(error).splitlines()[0]}") from error
    if root.node is None:
        raise root.error("the file is empty")
    return root


# ---------------------------------------------------------------- sentences


class _TemplateFiller:
    """Fills the slots of templates with the words of a group.

    Attributes:
        words: the words by group and slot.
        slots: the slots of all groups.
        num_words: the length of lists of words; 1 without lists.
    """

    def __init__(self, groups: dict[str, _Value]):
        self.groups = groups
        self.words: dict[str, dict[str, list[str]]] = {name: {} for name in groups}
        self.num_words, first_list = 1, ""
        for name, group in groups.items():
            for slot, value in group.mapping().items():
                words = self.words[name][slot] = value.texts(allow_blank=True)
                if len(words) > 1 and self.num_words not in (1, len(words)):
                    raise value.error(f"has {len(words)} words, but {first_list} has {self.num_words}")
                if len(words) > 1 and self.num_words == 1:
                    self.num_words, first_list = len(words), f"{name}.{slot}"
        self.slots = list(dict.fromkeys(slot for slots in self.words.values() for slot in slots))

    def word(self, slot: str, group: str, index: int) -> str:
        """The word of a group for a slot at an index of the lists of words."""
        words = self.words[group][slot]
        return words[index % len(words)]

    def fill(self, template: str, group: str, index: int, entry: _Value) -> str:
        """A template of an entry with the words of a group."""
        parts: list[str] = []
        try:
            fields = list(Formatter().parse(template))
        except ValueError as error:
            raise entry.error(f"{template!r} is not well formed: {error}") from error
        for literal, slot, format_spec, conversion in fields:
            parts.append(literal)
            if slot is None:
                continue
            if conversion or format_spec not in ("", "capitalize"):
                raise entry.error(f"in {template!r}: write {{{slot}}} or {{{slot}:capitalize}}")
            if slot not in self.slots:
                raise entry.error(f"{{{slot}}} is not a slot of any group: choose from {join_names(self.slots)}")
            if slot not in self.words[group]:
                raise self.groups[group].error(f"no word for {{{slot}}}, which the template in line {entry.line} needs")
            word = self.word(slot, group, index)
            parts.append(_capitalize(word) if format_spec else word)
        return "".join(parts)


def _expand_template(entry: _Value, filler: _TemplateFiller) -> list[TemplateSentence]:
    """The sentences of a template: one per text, or one per text and index of the lists of words in it."""
    fields: dict[str, _Value] = {"text": entry}
    if entry.node.id == "mapping":
        fields = entry.mapping(("text", "continuations", "instead"), required=("text",))
    own = fields["instead"].mapping(tuple(filler.words)) if "instead" in fields else {}
    own_texts = {name: value.texts()[0] for name, value in own.items()}
    continuations = fields["continuations"].texts() if "continuations" in fields else []
    expanded: list[TemplateSentence] = []
    for text in fields["text"].texts():
        sentences: list[TemplateSentence] = []
        for index in range(filler.num_words):
            texts = {name: filler.fill(own_texts.get(name, text), name, index, entry) for name in filler.words}
            endings = {c: {name: filler.fill(c, name, index, entry) for name in filler.words} for c in continuations}
            if all((texts, endings) != (other.texts, other.continuations) for other in sentences):
                sentences.append(TemplateSentence(text, index, texts, endings))
        if all(len(set(sentence.texts.values())) == 1 for sentence in sentences):
            raise entry.error(f"{text!r} is the same for every group: add a slot such as {{{filler.slots[0]}}}")
        expanded += sentences
    return expanded


def _capitalize(word: str, is_turkic: bool = False) -> str:
    return ("İ" if is_turkic and word[:1] == "i" else word[:1].upper()) + word[1:]
