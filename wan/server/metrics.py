"""What Prometheus reads of a server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30)


class Metrics:
    """The numbers of one server."""

    def __init__(self) -> None:
        here = self.registry = CollectorRegistry()
        self.requests = Counter("wan_requests", "Requests", ("method", "status"), registry=here)
        self.latency = Histogram(
            "wan_request_seconds",
            "Time until a request is answered, without streams",
            ("method",),
            buckets=_SECONDS,
            registry=here,
        )
        self.tickets = Gauge("wan_chains", "Chains by state", ("state",), registry=here)
        self.chains = Counter("wan_chains_ended", "Chains that ended, by how", ("state",), registry=here)
        self.clips = Counter("wan_clips", "Clips that were finished", registry=here)
        self.steps = Counter("wan_step_reports", "Words of the worker about a solver step", registry=here)
        self.workers = Counter("wan_workers_lost", "Workers that ended and were replaced", registry=here)
        self.busy = Gauge("wan_worker_busy", "Whether a chain is being made", registry=here)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        page: bytes = generate_latest(self.registry)
        return page
