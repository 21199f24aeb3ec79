"""Builds everything that needs torch. Importing this module imports torch: only once the service is listening."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from shardd.config import Config
from shardd.cpus import listed, place
from shardd.devices import Device, choose_device
from shardd.engine import Engine
from shardd.loading import Loader
from shardd.logging import Logger
from shardd.membership import Membership, serve_store
from shardd.metrics import Metrics
from shardd.progress import Progress
from shardd.reading import Reader
from shardd.rendezvous import Rendezvous
from shardd.service import Core
from shardd.status import Board
from tensor_parallel.group import Group


@dataclass(frozen=True)
class Built:
    """The parts that the daemon itself handles. ``store`` is kept: peers use it for as long as this process lives."""

    core: Core
    engine: Engine
    progress: Progress
    loader: Loader
    membership: Membership
    store: object
    warm: Callable[[], None]


def build(config: Config, board: Board, rendezvous: Rendezvous, metrics: Metrics, log: Logger) -> Built:
    """Choose the device, serve the store, start the executor. Raises :class:`~shardd.errors.StartError`."""
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config)
    cpus = _pin(config, device, log)
    store = serve_store(rendezvous.listener)
    group = Group(config.rank, config.world_size)
    progress = Progress(lambda: group.stats.seconds, lambda: group.stats.begun)
    engine = Engine(
        rank=config.rank,
        device=device.torch,
        group=group,
        generations=board.generations,
        models=board.models,
        progress=progress,
        metrics=metrics,
        log=log,
        cpus=cpus,
        intact=lambda: device.works() and board.models.intact(),
    )
    membership = Membership(
        group=group,
        device=device.torch,
        backend=config.backend,
        host=rendezvous.host,
        generations=board.generations,
        models=board.models,
        engine=engine,
        log=log,
        fence_seconds=config.fence_seconds,
    )
    reader = Reader(
        group=group,
        device=device.torch,
        device_memory=device.memory,
        model_root=config.model_root,
        factories=config.allow_factory,
    )
    loader = Loader(board.models, metrics, reader.read, log, board.generations.note)
    board.device, board.progress = device, progress
    engine.start()
    return Built(
        Core(membership, loader, reader.plan),
        engine,
        progress,
        loader,
        membership,
        store,
        lambda: loader.prepare(reader.warm),
    )


def _pin(config: Config, device: Device, log: Logger) -> tuple[int, ...]:
    """The CPUs of what computes; none: those of the process."""
    found = place(
        config.cpus,
        on_cpu=device.torch.type == "cpu",
        local_rank=config.local_rank,
        local_ranks=config.local_ranks,
        threads=torch.get_num_threads(),
    )
    if found.cpus and not config.threads and torch.get_num_threads() > len(found.cpus):
        torch.set_num_threads(len(found.cpus))
    pinned = listed(found.cpus) if found.cpus else "none"
    log.info("cpus", pinned=pinned, why=found.why, threads=torch.get_num_threads())
    return found.cpus
