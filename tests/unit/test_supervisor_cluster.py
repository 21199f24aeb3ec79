"""What a node is told to run: pins, threads, addresses, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.supervisor import cluster, devices
from coordinator.supervisor.child import describe_exit
from coordinator.supervisor.cluster import ClusterError, Front, Node, coordinator, daemons, port_file

UUIDS = ["GPU-a", "GPU-b"]


@pytest.fixture
def gpus(monkeypatch):
    """Makes the driver list so many GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(count: int) -> None:
        monkeypatch.setattr(devices, "_driver_uuids", lambda: [f"GPU-{chr(97 + n)}" for n in range(count)])

    make(0)
    return make


def flag(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_daemons_on_the_cpu_share_the_cores(gpus, monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "cores", lambda: 5)
    specs = daemons(Node(ranks=2, model_root=tmp_path), tmp_path)
    assert [spec.name for spec in specs] == ["rank 0", "rank 1"]
    argv = specs[1].argv()
    assert (flag(argv, "--rank"), flag(argv, "--world-size"), flag(argv, "--threads")) == ("1", "2", "2")
    assert (flag(argv, "--local-rank"), flag(argv, "--local-ranks")) == ("1", "2")
    assert flag(argv, "--device") == "cpu"
    assert flag(argv, "--listen") == f"unix:{tmp_path}/rank1.sock"
    assert specs[1].health == flag(argv, "--health-listen")


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(1, 4, "1"), (8, 3, "2")])
def test_each_rank_has_a_thread_at_least(gpus, monkeypatch, tmp_path, cores, ranks, threads):
    monkeypatch.setattr(cluster, "cores", lambda: cores)
    assert flag(daemons(Node(ranks=ranks), tmp_path)[0].argv(), "--threads") == threads


def test_threads_said_otherwise_are_left_alone(gpus, monkeypatch, tmp_path):
    assert flag(daemons(Node(ranks=2, threads=7), tmp_path)[0].argv(), "--threads") == "7"
    monkeypatch.setenv("SHARDD_THREADS", "3")
    assert "--threads" not in daemons(Node(ranks=2), tmp_path)[0].argv()


def test_each_rank_is_pinned_to_its_own_gpu(gpus, tmp_path):
    gpus(3)
    specs = daemons(Node(ranks=2), tmp_path)
    assert [spec.environment["CUDA_VISIBLE_DEVICES"] for spec in specs] == ["GPU-a", "GPU-b"]
    assert specs[0].environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert flag(specs[0].argv(), "--device") == "cuda"


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("1", ["GPU-b"]),
        ("1,0", ["GPU-b", "GPU-a"]),
        ("", []),
        ("0,7,1", ["GPU-a"]),
        ("MIG-x, GPU-y", ["MIG-x", "GPU-y"]),
    ],
)
def test_only_visible_gpus_count_as_cuda_reads_the_variable(gpus, visible, found):
    gpus(2)
    assert devices.gpus({"CUDA_VISIBLE_DEVICES": visible}) == found


def test_more_ranks_than_gpus_says_what_to_do(gpus, tmp_path):
    gpus(1)
    with pytest.raises(ClusterError, match=r"--ranks 2 needs as many GPUs, but 1 can be used here; use --ranks 1"):
        daemons(Node(ranks=2), tmp_path)
    specs = daemons(Node(ranks=2, allow_shared_gpu=True), tmp_path)
    assert [spec.environment["CUDA_VISIBLE_DEVICES"] for spec in specs] == ["GPU-a", "GPU-a"]
    assert "--allow-shared-gpu" in specs[0].argv()
    assert flag(specs[0].argv(), "--backend") == "gloo"  # which copies through the host; NCCL refuses such ranks
    assert (
        flag(daemons(Node(ranks=2, allow_shared_gpu=True, backend="nccl"), tmp_path)[0].argv(), "--backend") == "nccl"
    )
    gpus(2)
    assert "--backend" not in daemons(Node(ranks=2, allow_shared_gpu=True), tmp_path)[0].argv()
    assert flag(daemons(Node(ranks=2, device="cpu"), tmp_path)[0].argv(), "--device") == "cpu"


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (Node(ranks=1, device="cuda"), "no GPU was found"),
        (Node(ranks=1, model_root=Path("/no/such")), "'/no/such' is not a directory"),
        (Node(ranks=2, rank_offset=3, world_size=4), "ranks up to 4 do not fit in 4"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(gpus, tmp_path, node, says):
    with pytest.raises(ClusterError, match=says):
        daemons(node, tmp_path)


def test_a_node_of_a_larger_cluster(gpus, tmp_path):
    node = Node(ranks=2, listen="0.0.0.0:7000", rank_offset=2, world_size=4, advertise="10.0.0.2", backend="gloo")
    argv = daemons(node, tmp_path)[1].argv()
    assert (flag(argv, "--rank"), flag(argv, "--world-size")) == ("3", "4")
    assert flag(argv, "--listen") == "0.0.0.0:7001"
    assert (flag(argv, "--advertise"), flag(argv, "--backend")) == ("10.0.0.2", "gloo")


def test_a_restarted_coordinator_keeps_the_port_that_the_kernel_chose(tmp_path):
    spec = coordinator(Front(port=0), Node(ranks=2), tmp_path)
    assert flag(spec.argv(), "--listen") == "127.0.0.1:0"
    port_file(tmp_path).write_text("127.0.0.1:43210\n")
    assert flag(spec.argv(), "--listen") == "127.0.0.1:43210"
    assert [part for part in spec.argv() if part.endswith(".sock")] == [f"unix:{tmp_path}/rank{n}.sock" for n in (0, 1)]


def test_the_coordinator_gets_its_secrets_by_file(tmp_path):
    front = Front(token_file=Path("/t"), tls_cert=Path("/c"), tls_key=Path("/k"), state_dir=Path("/s"))
    argv = coordinator(front, Node(ranks=1), tmp_path).argv()
    assert (flag(argv, "--token-file"), flag(argv, "--tls-cert"), flag(argv, "--tls-key")) == ("/t", "/c", "/k")
    assert flag(argv, "--state-dir") == "/s"


def test_this_machine_has_a_core():
    assert devices.cores() >= 1


@pytest.mark.parametrize(
    ("code", "text"), [(0, "exit code 0"), (70, "exit code 70"), (-9, "SIGKILL"), (-63, "signal 63")]
)
def test_exits_are_named(code, text):
    assert describe_exit(code) == text
