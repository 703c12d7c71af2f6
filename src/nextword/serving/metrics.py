"""Numbers for Prometheus, in its text format (version 0.0.4). Written and read by one thread, the event loop's."""

import bisect
from collections.abc import Callable

Labels = tuple[tuple[str, str], ...]
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


def format_sample_name(name: str, labels: Labels) -> str:
    inside = ",".join(f'{key}="{_escape_label_value(value)}"' for key, value in labels)
    return f"{name}{{{inside}}}" if inside else name


def _escape_label_value(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Counter:
    """A number that only grows, for each set of labels."""

    metric_type = "counter"

    def __init__(self, *label_names: str):
        self.label_names = label_names
        self.values: dict[Labels, float] = {} if label_names else {(): 0}

    def inc(self, amount: float = 1, *label_values: str) -> None:
        key = tuple(zip(self.label_names, label_values, strict=True))
        self.values[key] = self.values.get(key, 0) + amount

    def format_samples(self, name: str) -> list[str]:
        return [f"{format_sample_name(name, labels)} {value:.17g}" for labels, value in sorted(self.values.items())]


class Gauge:
    """What a function gives when it is asked."""

    metric_type = "gauge"

    def __init__(self, read_value: Callable[[], float]):
        self.read_value = read_value

    def format_samples(self, name: str) -> list[str]:
        return [f"{name} {self.read_value():.17g}"]


class Histogram:
    """How many of the numbers seen were at most so large, for some limits."""

    metric_type = "histogram"

    def __init__(self, bucket_bounds: tuple[float, ...] = LATENCY_BUCKETS):
        self.bucket_bounds = bucket_bounds
        self.counts = [0] * (len(bucket_bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bucket_bounds, value)] += 1
        self.total += value

    def format_samples(self, name: str) -> list[str]:
        lines, below = [], 0
        for limit, count in zip((*map(str, self.bucket_bounds), "+Inf"), self.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{limit}"}} {below}')
        return [*lines, f"{name}_sum {self.total:.17g}", f"{name}_count {below}"]


class Metrics:
    """All of them, by name, each with what it counts."""

    def __init__(self) -> None:
        self.requests = Counter("route", "status")
        self.prompt_tokens, self.generated_tokens, self.client_disconnects = Counter(), Counter(), Counter()
        self.time_to_first_token, self.inter_token_latency, self.request_seconds = Histogram(), Histogram(), Histogram()
        self.registry: dict[str, tuple[str, Counter | Gauge | Histogram]] = {
            "nextword_requests_total": ("Answers, by route and status.", self.requests),
            "nextword_prompt_tokens_total": ("Tokens of prompts that were let in.", self.prompt_tokens),
            "nextword_generated_tokens_total": ("Tokens that were drawn.", self.generated_tokens),
            "nextword_clients_left_total": (
                "Requests whose client left before the answer was whole.",
                self.client_disconnects,
            ),
            "nextword_time_to_first_token_seconds": ("From letting in to the first token.", self.time_to_first_token),
            "nextword_time_between_tokens_seconds": ("From one token of a text to its next.", self.inter_token_latency),
            "nextword_request_seconds": ("From a request's headers to the end of its answer.", self.request_seconds),
        }

    def register_gauge(self, name: str, documentation: str, read_value: Callable[[], float]) -> None:
        self.registry[name] = (documentation, Gauge(read_value))

    def render(self) -> str:
        lines = []
        for name, (help, metric) in self.registry.items():
            lines += [f"# HELP {name} {help}", f"# TYPE {name} {metric.metric_type}", *metric.format_samples(name)]
        return "\n".join(lines) + "\n"
