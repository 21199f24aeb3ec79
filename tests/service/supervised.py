"""A small child for the supervisor's tests, and a program that supervises some: real processes over real sockets.

``python -m tests.service.supervised child NAME DIRECTORY [BEHAVIOUR]`` serves ``grpc.health.v1`` on
DIRECTORY/NAME.health. Behaviours: `unready` never gets ready, `exit2` and `crash` end at once, `stubborn` ignores
SIGTERM, `parent` starts a process of its own and notes its pid.

``python -m tests.service.supervised supervise DIRECTORY NAME=BEHAVIOUR...`` runs a Supervisor; one stage per child.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def note(directory: Path, line: str) -> None:
    with (directory / "notes").open("a") as file:
        file.write(line + "\n")


def child(name: str, directory: Path, behaviour: str = "") -> None:
    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    note(directory, f"start {name} {os.getpid()}")
    if behaviour in ("exit2", "crash"):
        sys.exit(2 if behaviour == "exit2" else 9)
    if behaviour == "parent":
        started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        note(directory, f"grandchild {name} {started.pid}")
    servicer = health.HealthServicer()
    server = grpc.server(ThreadPoolExecutor(4))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix:{directory}/{name}.health")
    servicer.set("liveness", health_pb2.HealthCheckResponse.SERVING)
    if behaviour != "unready":
        servicer.set("readiness", health_pb2.HealthCheckResponse.SERVING)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: None if behaviour == "stubborn" else ended.set())
    server.start()
    print(f'{{"event": "hello", "name": "{name}"}}', file=sys.stderr, flush=True)
    while not ended.wait(0.05):
        # What a C extension does that never lets go of the interpreter, when the test asks for it.
        if (directory / f"{name}.spin").exists():
            (directory / f"{name}.spin").unlink()
            sum(range(10**11))
    note(directory, f"end {name} {os.getpid()} {time.monotonic()}")


async def supervise(directory: Path, children: list[str]) -> None:
    from coordinator.logging import configure
    from coordinator.supervisor import ChildSpec, StartError, Supervisor
    from coordinator.supervisor.loop import Timing

    configure("info", "json", component="supervisor")
    private = directory / "private"
    private.mkdir()
    stages = []
    for text in children:
        name, _, behaviour = text.partition("=")
        argv = [sys.executable, "-m", "tests.service.supervised", "child", name, str(directory), behaviour]
        log_file = directory / f"{name}.log" if behaviour == "logged" else None
        stages.append(
            [
                ChildSpec(
                    name=name,
                    argv=lambda argv=argv: argv,
                    health=f"unix:{directory}/{name}.health",
                    stop_seconds=1.0 if behaviour == "stubborn" else 20.0,
                    log_file=log_file,
                )
            ]
        )
    supervisor = Supervisor(stages, private, Timing(busy=4.0, first_pause=0.1, longest_pause=0.4, hopeless=5))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    started, stopped = asyncio.create_task(supervisor.start()), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([started, stopped], return_when=asyncio.FIRST_COMPLETED)
        if started.done():
            await started
            print("UP", flush=True)
        await stopped
    except StartError as error:
        print(f"StartError {error.code}: {error}", flush=True)
        raise SystemExit(error.code) from None
    finally:
        started.cancel()
        await supervisor.stop()


if __name__ == "__main__":
    if sys.argv[1] == "child":
        child(sys.argv[2], Path(sys.argv[3]), *sys.argv[4:])
    else:
        asyncio.run(supervise(Path(sys.argv[2]), sys.argv[3:]))
