"""The server's metrics for Prometheus."""

from prometheus_client import (
  CollectorRegistry,
  Counter,
  Gauge,
  Histogram,
  disable_created_metrics,
  generate_latest,
)
from prometheus_client.process_collector import ProcessCollector

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
  """The metrics of one server, in their own registry."""

  def __init__(self) -> None:
    disable_created_metrics()
    self.registry = CollectorRegistry()
    ProcessCollector(registry=self.registry)
    make = lambda kind, name, what, labels=(), **options: kind(
      f"jflow_{name}", what, labels, registry=self.registry, **options
    )
    self.requests = make(Counter, "requests", "Requests answered", ("path", "status"))
    self.seconds = make(
      Histogram, "request_seconds", "From a request's arrival to its end", ("path",), buckets=_SECONDS
    )
    self.first_token = make(
      Histogram, "first_token_seconds", "From a question's arrival to its first token", buckets=_SECONDS
    )
    self.tokens = make(Counter, "tokens", "Tokens read and written", ("kind",))
    self.pictures = make(Counter, "pictures", "Pictures painted")
    self.waiting = make(Gauge, "waiting", "Requests that wait for the model", ("kind",))
    self.running = make(Gauge, "running", "Requests that the model works on", ("kind",))
    self.batch = make(Histogram, "painting_batch", "Pictures painted at once", buckets=(1, 2, 4, 8, 16, 32))
    self.busy = make(Counter, "busy_seconds", "Time that the model worked", ("kind",))
    self.failures = make(Counter, "failures", "Times that the model's work failed")
    self.ready = make(Gauge, "ready", "1 while requests are answered without delay for compilation")

  def text(self) -> bytes:
    """All metrics in Prometheus' text format."""
    return generate_latest(self.registry)
