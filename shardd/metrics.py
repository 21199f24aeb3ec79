"""Prometheus metrics: counted where things happen, gauges read from recorded state when scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shardd.addresses import Address, BindError

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from protos.tensor_parallel.v1 import shard_pb2

_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
_STATES = ("NOPG", "FENCED", "READY", "BROKEN")


@dataclass(frozen=True)
class ModelMetrics:
    """The series of one model, looked up once."""

    forward: Histogram
    collective: Histogram
    copy: Histogram


class Metrics:
    """This daemon's series, in a registry of their own. ``status`` gives the recorded state at each scrape."""

    def __init__(self, rank: int) -> None:
        self._rank = str(rank)
        self.registry = CollectorRegistry()
        self._server: WSGIServer | None = None
        both = ("rank", "model")
        self._forward = self._histogram("shardd_forward_seconds", "Running the model, collectives included", both)
        self._collective = self._histogram("shardd_collective_seconds", "Inside collectives, per forward", both)
        self._copy = self._histogram("shardd_copy_seconds", "Taking inputs in and outputs out, per forward", both)
        self._per_model = (self._forward, self._collective, self._copy)
        self._commands = Counter("shardd_commands", "Commands by result", ("rank", "result"), registry=self.registry)
        self._results: dict[str, Counter] = {}
        self._bytes = Counter("shardd_load_bytes", "Weight bytes read", ("rank",), registry=self.registry)

    def _histogram(self, name: str, text: str, labels: tuple[str, ...]) -> Histogram:
        return Histogram(name, text, labels, buckets=_SECONDS, registry=self.registry)

    def model(self, name: str) -> ModelMetrics:
        """The series of model ``name``; all its versions share them."""
        return ModelMetrics(*(family.labels(self._rank, name) for family in self._per_model))

    def forget(self, name: str) -> None:
        """Drop the series of a model of which no version is left."""
        for family in self._per_model:
            family.remove_by_labels({"rank": self._rank, "model": name})

    def forward(self, series: ModelMetrics, forward: float, collective: float, copy: float) -> None:
        """Seconds; see the series' own words."""
        series.forward.observe(forward)
        series.collective.observe(collective)
        series.copy.observe(copy)

    def command(self, result: str) -> None:
        counter = self._results.get(result)
        if counter is None:
            counter = self._results[result] = self._commands.labels(self._rank, result)
        counter.inc()

    def loaded(self, size: int) -> None:
        self._bytes.labels(self._rank).inc(size)

    def watch(self, status: Callable[[], shard_pb2.StatusResponse]) -> None:
        """Read gauges from ``status`` at each scrape."""
        self.registry.register(_Gauges(status))

    def listen(self, address: Address) -> Address:
        """Serve ``/metrics`` on ``address``, until :meth:`close`; the address bound. Raises :class:`BindError`."""
        try:
            self._server, _thread = start_http_server(address.port, address.host, registry=self.registry)
        except OSError as error:
            raise BindError(f"cannot listen on {address} for metrics: {error.strerror}") from None
        return Address(address.host, self._server.server_port)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()


class _Gauges(Collector):
    def __init__(self, status: Callable[[], shard_pb2.StatusResponse]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        rank = str(status.rank)
        generation = GaugeMetricFamily("shardd_generation", "The generation this rank is in", labels=("rank",))
        generation.add_metric((rank,), status.generation)
        loads = CounterMetricFamily("shardd_loads", "Weight loads since the start", labels=("rank",))
        loads.add_metric((rank,), status.loads)
        state = GaugeMetricFamily("shardd_state", "1 for the state this rank is in", labels=("rank", "state"))
        for name in _STATES:
            state.add_metric((rank, name), float(name == status.state))
        held = GaugeMetricFamily("shardd_bytes_held", "Bytes of parameters and buffers", labels=("rank", "model"))
        sums: dict[str, int] = {}
        for model in status.models:
            sums[model.name] = sums.get(model.name, 0) + model.bytes_held
        for name, size in sums.items():
            held.add_metric((rank, name), size)
        yield from (generation, loads, state, held)

    def describe(self) -> Iterator[Metric]:
        return iter(())
