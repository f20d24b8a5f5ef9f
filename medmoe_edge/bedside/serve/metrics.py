"""What Prometheus may know of the service: counts and seconds, nothing of any question or image."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from medmoe_edge.bedside.serve.queue import Places
from medmoe_edge.engine.answer import Answer

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The figures of one service."""

    def __init__(self, places: Places) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._requests = Counter(
            "medmoe_requests",
            "Requests by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self._request_seconds = Histogram(
            *("medmoe_request_seconds", "From request to response.", ["route"]),
            buckets=SECONDS,
            registry=registry,
        )
        self._first_token = Histogram(
            *("medmoe_first_token_seconds", "From image to first token, without the queue."),
            buckets=SECONDS,
            registry=registry,
        )
        self._answers = Counter(
            "medmoe_answers", "Questions answered.", ["prefix_reused"], registry=registry
        )
        self._tokens = Counter("medmoe_answer_tokens", "Tokens of all answers.", registry=registry)
        taken = Gauge(
            "medmoe_requests_under_way", "Being sent, waiting or answered.", registry=registry
        )
        taken.set_function(lambda: places.taken)

    def saw_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request; `route` is its template, never what the client sent."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def saw_answer(self, answer: Answer) -> None:
        """Count an answer."""
        times = answer.timings
        self._answers.labels(str(times.prefix_reused).lower()).inc()
        self._tokens.inc(times.tokens)
        self._first_token.observe(times.first_token)

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)
