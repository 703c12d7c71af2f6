"""Numbers for Prometheus, in its text format (version 0.0.4). Written and read by one thread, the event loop's."""

import bisect
from collections.abc import Callable

Labels = tuple[tuple[str, str], ...]
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


def name_of(name: str, labels: Labels) -> str:
    inside = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels)
    return f"{name}{{{inside}}}" if inside else name


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Counter:
    """A number that only grows, for each set of labels."""

    kind = "counter"

    def __init__(self, *labels: str):
        self.labels = labels
        self.values: dict[Labels, float] = {} if labels else {(): 0}

    def add(self, amount: float = 1, *values: str) -> None:
        key = tuple(zip(self.labels, values, strict=True))
        self.values[key] = self.values.get(key, 0) + amount

    def lines(self, name: str) -> list[str]:
        return [f"{name_of(name, labels)} {value:.17g}" for labels, value in sorted(self.values.items())]


class Gauge:
    """What a function gives when it is asked."""

    kind = "gauge"

    def __init__(self, read: Callable[[], float]):
        self.read = read

    def lines(self, name: str) -> list[str]:
        return [f"{name} {self.read():.17g}"]


class Histogram:
    """How many of the numbers seen were at most so large, for some limits."""

    kind = "histogram"

    def __init__(self, limits: tuple[float, ...] = SECONDS):
        self.limits = limits
        self.counts = [0] * (len(limits) + 1)
        self.total = 0.0

    def see(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.limits, value)] += 1
        self.total += value

    def lines(self, name: str) -> list[str]:
        lines, below = [], 0
        for limit, count in zip((*map(str, self.limits), "+Inf"), self.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{limit}"}} {below}')
        return [*lines, f"{name}_sum {self.total:.17g}", f"{name}_count {below}"]


class Metrics:
    """All of them, by name, each with what it counts."""

    def __init__(self) -> None:
        self.requests = Counter("route", "status")
        self.prompt_tokens, self.generated_tokens, self.left = Counter(), Counter(), Counter()
        self.first_token, self.between_tokens, self.request_seconds = Histogram(), Histogram(), Histogram()
        self.all: dict[str, tuple[str, Counter | Gauge | Histogram]] = {
            "nextword_requests_total": ("Answers, by route and status.", self.requests),
            "nextword_prompt_tokens_total": ("Tokens of prompts that were let in.", self.prompt_tokens),
            "nextword_generated_tokens_total": ("Tokens that were drawn.", self.generated_tokens),
            "nextword_clients_left_total": ("Requests whose client left before the answer was whole.", self.left),
            "nextword_time_to_first_token_seconds": ("From letting in to the first token.", self.first_token),
            "nextword_time_between_tokens_seconds": ("From one token of a text to its next.", self.between_tokens),
            "nextword_request_seconds": ("From a request's headers to the end of its answer.", self.request_seconds),
        }

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        self.all[name] = (help, Gauge(read))

    def text(self) -> str:
        lines = []
        for name, (help, metric) in self.all.items():
            lines += [f"# HELP {name} {help}", f"# TYPE {name} {metric.kind}", *metric.lines(name)]
        return "\n".join(lines) + "\n"
