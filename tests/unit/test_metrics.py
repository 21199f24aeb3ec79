"""What the coordinator exports, read as a scraper reads it."""

import time
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.metrics import Metrics, MetricsServer


@pytest.fixture
def metrics():
    return Metrics(version="1.2.3")


@pytest.fixture
def scrape(metrics):
    server = MetricsServer(metrics, "127.0.0.1", 0)

    def read():
        with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    read.address = server.address
    yield read
    server.close()


def loaded(metrics, **models):
    metrics.set_models(models)


def test_requests_count_by_model_and_code(metrics, scrape):
    loaded(metrics, mlp=True)
    metrics.request_finished("mlp", "OK", 0.003)
    metrics.request_finished("mlp", "OK", 0.2)
    metrics.request_finished("mlp", "UNAVAILABLE", 0.001)
    seen = scrape()
    assert seen["coordinator_requests_total", ("code", "OK"), ("model", "mlp")] == 2
    assert seen["coordinator_requests_total", ("code", "UNAVAILABLE"), ("model", "mlp")] == 1
    assert seen["coordinator_request_seconds_count", ("model", "mlp")] == 3
    assert seen["coordinator_request_seconds_bucket", ("le", "0.005"), ("model", "mlp")] == 2


def test_clients_cannot_add_series_by_making_up_models(metrics, scrape):
    for n in range(50):
        metrics.request_finished(f"made-up-{n}", "NOT_FOUND", 0.001)
    seen = scrape()
    assert seen["coordinator_requests_total", ("code", "NOT_FOUND"), ("model", "unknown")] == 50
    assert not any("made-up" in str(key) for key in seen)


def test_batches_queue_and_parts_of_a_forward(metrics, scrape):
    loaded(metrics, mlp=True)
    metrics.dispatched("mlp", 6, [0.001, 0.002, 0.003])
    metrics.answered("mlp", 0.01)
    metrics.watch(lambda: 4, lambda: 2)
    metrics.received_bytes.inc(1000)
    metrics.sent_bytes.inc(10)
    seen = scrape()
    assert seen["coordinator_batch_rows_sum", ("model", "mlp")] == 6
    assert seen["coordinator_queue_seconds_count", ("model", "mlp")] == 3
    assert seen["coordinator_forward_seconds_sum", ("model", "mlp")] == 0.01
    assert (seen[("coordinator_queue_depth",)], seen[("coordinator_in_flight",)]) == (4, 2)
    assert (seen[("coordinator_received_bytes_total",)], seen[("coordinator_sent_bytes_total",)]) == (1000, 10)


def test_state_gauges_follow_and_leave_with_the_model(metrics, scrape):
    metrics.serving.set(False)
    metrics.set_models({"mlp": False, "bert": True})
    metrics.set_ranks([True, False])
    metrics.request_finished("mlp", "OK", 0.003)
    seen = scrape()
    assert seen["coordinator_model_serving", ("model", "mlp")] == 0
    assert seen["coordinator_model_serving", ("model", "bert")] == 1
    assert seen[("coordinator_serving",)] == 0
    assert (seen["coordinator_rank_up", ("rank", "0")], seen["coordinator_rank_up", ("rank", "1")]) == (1, 0)
    metrics.serving.set(True)
    metrics.set_models({"bert": True})
    metrics.set_ranks([True, True])
    seen = scrape()
    assert ("coordinator_model_serving", ("model", "mlp")) not in seen
    assert seen["coordinator_requests_total", ("code", "OK"), ("model", "mlp")] == 1
    assert seen[("coordinator_serving",)] == 1
    assert seen["coordinator_rank_up", ("rank", "1")] == 1


def test_generations_and_loads(metrics, scrape):
    metrics.generation_ended("rank_lost")
    metrics.generation_ended("Rank 1 said: 12 bytes of poetry")
    metrics.generation_started(8, 0.7)
    metrics.load_finished("INVALID_ARGUMENT", 0.3)
    seen = scrape()
    assert seen[("coordinator_generation",)] == 8
    assert seen["coordinator_generations_total", ("reason", "rank_lost")] == 1
    assert seen["coordinator_generations_total", ("reason", "other")] == 1
    assert seen["coordinator_recovery_seconds_bucket", ("le", "1.0")] == 1
    assert seen["coordinator_load_seconds_count", ("code", "INVALID_ARGUMENT")] == 1


def test_names_follow_prometheus_conventions(metrics):
    for family in metrics.registry.collect():
        assert family.name.startswith(("coordinator_", "process_"))
        assert family.documentation
        assert not {label for sample in family.samples for label in sample.labels} & {"generation", "request_id"}
        if family.type == "histogram":
            assert family.name.endswith(("_seconds", "_bytes", "_rows"))


def test_only_the_metrics_path_is_served(scrape):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{scrape.address}/", timeout=10)
    assert refused.value.code == 404


def test_openmetrics_is_negotiated(metrics, scrape):
    asked = urllib.request.Request(
        f"http://{scrape.address}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
    )
    with urllib.request.urlopen(asked, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        assert answer.read().endswith(b"# EOF\n")


def test_an_address_in_use_is_refused(metrics, scrape):
    port = int(scrape.address.rsplit(":", 1)[1])
    with pytest.raises(OSError, match="in use"):
        MetricsServer(metrics, "127.0.0.1", port)


def test_closing_gives_the_port_back(metrics):
    server = MetricsServer(metrics, "127.0.0.1", 0)
    port = int(server.address.rsplit(":", 1)[1])
    began = time.monotonic()
    server.close()
    assert time.monotonic() - began < 5
    MetricsServer(metrics, "127.0.0.1", port).close()
