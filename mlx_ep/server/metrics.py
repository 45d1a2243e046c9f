"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlx_ep.server.requests import EngineState

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class ServerMetrics:
    """Counters of the HTTP side, and the engine's state when it is asked for.

    Attributes:
        requests: by endpoint and status.
        cancelled: answers whose client went away, or that an error of it ended.
        first_token: s from a request to its first token, with the queue.
        inter_token: s between tokens of an answer.
    """

    def __init__(self, state: Callable[[], EngineState]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "mlx_ep_http_requests",
            "Requests by endpoint and HTTP status",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self.cancelled = Counter(
            "mlx_ep_cancelled_answers",
            "Answers ended because their client went away",
            registry=self._registry,
        )
        self.first_token = Histogram(
            "mlx_ep_time_to_first_token_seconds",
            "From a request to its first token",
            buckets=_FIRST,
            registry=self._registry,
        )
        self.inter_token = Histogram(
            "mlx_ep_inter_token_seconds",
            "Between tokens of an answer",
            buckets=_BETWEEN,
            registry=self._registry,
        )
        self._registry.register(_EngineCollector(state))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, state: Callable[[], EngineState]) -> None:
        self._state = state

    def describe(self) -> Iterator[Metric]:
        return iter(())  # or registering would ask for the state

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        gauges = {
            "up": ("1, or 0 when a rank has failed", float(not state.failed)),
            "draining": ("1 when no request is taken", float(state.draining)),
            "running_requests": ("Requests in the batch", state.running),
            "waiting_requests": ("Requests in the queue", state.waiting),
            "prefix_cache_bytes": ("Of the prefix cache", state.cache_bytes),
            "prefix_cache_limit_bytes": ("Its bound", state.cache_limit),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"mlx_ep_{name}", text, value=value)
        counters = {
            "engine_steps": ("Steps of all ranks", state.steps),
            "prompt_tokens": ("Prompt tokens", state.tokens[0]),
            "generated_tokens": ("Generated tokens", state.tokens[1]),
            "prefix_cache_hits": ("Prompt tokens that were known", state.cache_hits),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"mlx_ep_{name}", text, value=value)
        for name, text in {
            "memory": "Bytes a rank holds",
            "kv_used": "Bytes of KV caches in use",
            "kv_limit": "Bytes that KV caches may take",
            "active": "Requests whose attention a rank runs",
        }.items():
            family = GaugeMetricFamily(f"mlx_ep_rank_{name}", text, labels=("rank",))
            for rank in state.ranks:
                family.add_metric((str(rank.rank),), getattr(rank, name))
            yield family
        family = GaugeMetricFamily(
            "mlx_ep_expert_rows",
            "Rows routed to a rank's experts while recording",
            labels=("layer", "rank"),
        )
        for layer, row in enumerate(state.experts):
            for number, rows in enumerate(row):
                family.add_metric((str(layer), str(number)), rows)
        yield family
