"""What an audit says: one measured thing after the other, each with its interval and what it would be if nothing were amiss."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SECTIONS = ("bias", "memory", "corpus", "cost")


@dataclass(frozen=True)
class Finding:
    """One measured thing.

    Attributes:
        section: one of `SECTIONS`.
        name: what was measured, in few words: "CrowS-Pairs, gender".
        value, low, high: the figure, and its interval (95 %) where it has one.
        unit: of these three: "%", "bits/byte", "documents", "kWh"; a share is given in per cent.
        n: how many items, texts or documents it rests on.
        reference: what it is where nothing is amiss (50 of stereotypes preferred, 0 of gaps); None where no such thing is.
        notable: whether it is to be read before a model is shipped: its interval leaves the reference out, or something was
            found that should not be there.
        note: one sentence: how it was measured, or what it means.
        examples: what was found, each by named texts: {"document": …, "passage": …}.
    """

    section: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    n: int | None = None
    reference: float | None = None
    notable: bool = False
    note: str = ""
    examples: tuple[Mapping[str, str], ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"examples": [dict(one) for one in self.examples]}
