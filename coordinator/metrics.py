"""The coordinator's Prometheus metrics: seconds and bytes, labelled by model and rank, generation as a gauge.

One ``Metrics`` has a registry of its own, so that several coordinators (and tests) live in one process.  Label values
are bounded: a request for a model that nobody loaded counts under ``unknown``, or any client could add series at will.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

REQUEST_BUCKETS = (*(0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),)
QUEUE_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
RECOVERY_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0)
LOAD_BUCKETS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)
ROW_BUCKETS = tuple(float(2**n) for n in range(11))
UNKNOWN = "unknown"
_REASON = re.compile(r"[a-z][a-z0-9_]{0,39}")


class _ModelSeries:
    """The children of one model's label, looked up once."""

    __slots__ = ("codes", "forward", "queue", "request", "rows")

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.request = metrics.request_seconds.labels(model)
        self.queue = metrics.queue_seconds.labels(model)
        self.forward = metrics.forward_seconds.labels(model)
        self.rows = metrics.batch_rows.labels(model)
        self.codes: dict[str, Counter] = {}


class Metrics:
    """Every metric that the coordinator exports, and the verbs by which the rest of it reports. Times are seconds.

    Called from the event loop; the HTTP thread exports (prometheus_client's values are locked). Gauges and counters
    without a verb are set directly: ``generation``, ``serving``.
    """

    def __init__(self, registry: CollectorRegistry | None = None, *, version: str = "") -> None:
        self.registry = registry or CollectorRegistry()
        self._series: dict[str, _ModelSeries] = {}
        self._models: set[str] = set()

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, registry=self.registry)

        def gauge(name: str, help: str, *labels: str) -> Gauge:
            return Gauge(name, help, labels, registry=self.registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, help, labels, buckets=buckets, registry=self.registry)

        self.requests = counter("coordinator_requests_total", "Requests answered.", "model", "code")
        self.request_seconds = histogram(
            "coordinator_request_seconds", "From a request's arrival to its answer.", REQUEST_BUCKETS, "model"
        )
        self.queue_seconds = histogram(
            "coordinator_queue_seconds", "From a request's arrival to its dispatch.", QUEUE_BUCKETS, "model"
        )
        self.forward_seconds = histogram(
            "coordinator_forward_seconds", "From dispatch to the answer of every rank.", REQUEST_BUCKETS, "model"
        )
        self.batch_rows = histogram("coordinator_batch_rows", "Rows joined into one forward.", ROW_BUCKETS, "model")
        self.queue_depth = gauge("coordinator_queue_depth", "Requests waiting for dispatch.")
        self.in_flight = gauge("coordinator_in_flight", "Requests dispatched and not answered.")
        self.generation = gauge("coordinator_generation", "The process group's generation.")
        self.serving = gauge("coordinator_serving", "1 while the group is ready and every model serves.")
        self.model_serving = gauge("coordinator_model_serving", "1 while a Forward would work.", "model")
        self.rank_up = gauge("coordinator_rank_up", "1 while the rank answers heartbeats.", "rank")
        self.generations = counter("coordinator_generations_total", "Generations ended, by what ended them.", "reason")
        self.recovery_seconds = histogram(
            "coordinator_recovery_seconds", "From a generation's end to serving again.", RECOVERY_BUCKETS
        )
        self.load_seconds = histogram("coordinator_load_seconds", "A model's load on all ranks.", LOAD_BUCKETS, "code")
        self.received_bytes = counter("coordinator_received_bytes_total", "Tensor bytes received from clients.")
        self.sent_bytes = counter("coordinator_sent_bytes_total", "Tensor bytes sent to clients.")
        gauge("coordinator_build_info", "Always 1.", "version").labels(version or UNKNOWN).set(1)
        ProcessCollector(registry=self.registry)

    def request_finished(self, model: str, code: str, seconds: float) -> None:
        """``code`` is a grpc.StatusCode's name; ``seconds`` count from the request's arrival."""
        label, series = self._of(model)
        series.request.observe(seconds)
        counter = series.codes.get(code)
        if counter is None:
            counter = series.codes[code] = self.requests.labels(label, code)
        counter.inc()

    def dispatched(self, model: str, rows: int, queue_seconds: Sequence[float]) -> None:
        """One forward left for the ranks, joining requests that had waited ``queue_seconds`` each."""
        series = self._of(model)[1]
        series.rows.observe(rows)
        for waited in queue_seconds:
            series.queue.observe(waited)

    def answered(self, model: str, seconds: float) -> None:
        """Every rank answered a forward (or its generation ended), ``seconds`` after its dispatch."""
        self._of(model)[1].forward.observe(seconds)

    def carried(self, received: int, sent: int) -> None:
        """A request of so many bytes got an answer of so many."""
        self.received_bytes.inc(received)
        self.sent_bytes.inc(sent)

    def watch(self, queue_depth: Callable[[], float], in_flight: Callable[[], float]) -> None:
        """Reads these two when asked, so that the hot path does not write them."""
        self.queue_depth.set_function(queue_depth)
        self.in_flight.set_function(in_flight)

    def set_model(self, model: str, serving: bool) -> None:
        """Makes ``model`` known as a label, and says whether it serves."""
        self._models.add(model)
        self.model_serving.labels(model).set(serving)

    def forget_model(self, model: str) -> None:
        """The model was unloaded on purpose: its gauge goes, its counters stay, because rates must not jump."""
        if model in self._models:
            self._models.discard(model)
            self.model_serving.remove(model)

    def set_models(self, serving: Mapping[str, bool]) -> None:
        """All models at once: those not named are forgotten."""
        for model in self._models - serving.keys():
            self.forget_model(model)
        for model, serves in serving.items():
            self.set_model(model, serves)

    def set_ranks(self, up: Sequence[bool]) -> None:
        for rank, alive in enumerate(up):
            self.rank_up.labels(str(rank)).set(alive)

    def generation_started(self, generation: int, recovery: float) -> None:
        """``recovery`` counts from the end of the last generation (or the start of the process)."""
        self.generation.set(generation)
        self.recovery_seconds.observe(recovery)

    def generation_ended(self, reason: str) -> None:
        """``reason`` is one of a few stable words (rank_lost, hung, uneven, collective, superseded, stopped)."""
        self.generations.labels(reason if _REASON.fullmatch(reason) else "other").inc()

    def load_finished(self, code: str, seconds: float) -> None:
        self.load_seconds.labels(code).observe(seconds)

    def _of(self, model: str) -> tuple[str, _ModelSeries]:
        label = model if model in self._models else UNKNOWN
        series = self._series.get(label)
        if series is None:
            series = self._series[label] = _ModelSeries(self, label)
        return label, series


class MetricsServer:
    """``GET /metrics`` over HTTP on its own thread; anything else is 404."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Binds at once (port 0: the kernel's choice); raises OSError when the address is taken."""
        registry = metrics.registry

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                if self.path.split("?", 1)[0] != "/metrics":
                    self.send_error(404, "only /metrics is served here")
                    return
                encoder, content_type = choose_encoder(self.headers.get("Accept", ""))
                body = encoder(registry)
                self.send_response(200)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are not news."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """A scraper that hangs up is not news either."""

        self._server = Server((host, port), Handler)
        self._thread = Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.2}, name="metrics", daemon=True
        )
        self._thread.start()

    @property
    def address(self) -> str:
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)
