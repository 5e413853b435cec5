"""Counters in Prometheus's text form (version 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Histogram:
    """How many observations (seconds) are below each of `BUCKETS`."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """In Prometheus's form: cumulative."""
        below = 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            below += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {below}'
        yield f"{name}_sum{{{labels}}} {self.total:.6f}"
        yield f"{name}_count{{{labels}}} {below}"


@dataclass
class Metrics:
    """What happened since the start."""

    requests: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    completion_tokens: Counter[str] = field(default_factory=Counter)
    first_token: dict[str, Histogram] = field(default_factory=dict)
    seconds: dict[str, Histogram] = field(default_factory=dict)
    refused: int = 0
    left: int = 0  # clients that went before their answer was whole

    def text(self, gauges: Iterable[tuple[str, str, dict[str, int]]]) -> str:
        """All of it; `gauges`: (name, help, value by model)."""
        lines: list[str] = []
        for name, about, values in gauges:
            lines += _family(name, about, "gauge")
            lines += [f'{name}{{model="{_escaped(model)}"}} {value}' for model, value in values.items()]
        name = "fledge_requests_total"
        lines += _family(name, "Requests by address, model and status.", "counter")
        for (path, model, status), count in sorted(self.requests.items()):
            lines.append(f'{name}{{path="{path}",model="{_escaped(model)}",status="{status}"}} {count}')
        for kind, counts in (("prompt", self.prompt_tokens), ("completion", self.completion_tokens)):
            name = f"fledge_{kind}_tokens_total"
            lines += _family(name, f"Tokens of {kind}s.", "counter")
            lines += [f'{name}{{model="{_escaped(m)}"}} {count}' for m, count in sorted(counts.items())]
        for name, about, count in (
            ("fledge_refused_total", "Requests refused because too many wait.", self.refused),
            ("fledge_clients_gone_total", "Clients that left before their answer was whole.", self.left),
        ):
            lines += [*_family(name, about, "counter"), f"{name} {count}"]
        for name, about, histograms in (
            ("fledge_time_to_first_token_seconds", "Until the first token was made.", self.first_token),
            ("fledge_request_seconds", "Until the answer was whole.", self.seconds),
        ):
            lines += _family(name, about, "histogram")
            for model, histogram in sorted(histograms.items()):
                lines += histogram.lines(name, f'model="{_escaped(model)}"')
        return "\n".join(lines) + "\n"


def _family(name: str, about: str, kind: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
