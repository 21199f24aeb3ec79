"""The executor: one thread that alone runs models and touches the process group, in the order of the channel.

It takes one session after another. Within a session it takes the commands of the channel, which must come as
``(g, 0), (g, 1), ...``; answers each; and stops at the first thing that makes the ranks differ: a failed collective, a
gap, a lost channel. Errors that are a request's own are answered and change nothing. Other threads talk to it by ending
its session: that aborts a running collective and closes the channel, and with that the executor lets go.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import grpc
import torch

from protos.tensor_parallel.v1 import shard_pb2
from shardd.channel import Channel, Request, Response
from shardd.errors import EXIT_STUCK, InvalidRequest, ModelError, Verdict, judge, known
from shardd.generation import Generations
from shardd.logging import Logger
from shardd.metrics import Metrics
from shardd.models import Models, Served
from shardd.progress import Progress
from shardd.reports import PATIENCE, Forwarded, Reports
from shardd.session import Session
from shardd.title import name_thread
from tensor_parallel.errors import PeerLost
from tensor_parallel.group import Group


class GenerationOver(Exception):
    """The executor found that its generation cannot go on."""


class Engine:
    """Runs sessions given by :meth:`serve` on a thread of its own."""

    def __init__(
        self,
        *,
        rank: int,
        device: torch.device,
        group: Group,
        generations: Generations,
        models: Models,
        progress: Progress,
        metrics: Metrics,
        log: Logger,
        cpus: Collection[int] = (),
        intact: Callable[[], bool] = lambda: True,
    ) -> None:
        self._rank = rank
        self._device = device
        self._group = group
        self._generations = generations
        self._models = models
        self._progress = progress
        self._metrics = metrics
        self._log = log
        self._reports = Reports(metrics, log)
        self._cpus = cpus
        self._intact = intact
        self._inbox: SimpleQueue[tuple[Session, Channel] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """End the thread once its session has ended; whether it did within ``seconds``."""
        self._inbox.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def serve(self, session: Session, channel: Channel) -> None:
        """Hand over ``session``, to which ``channel`` has been attached."""
        self._inbox.put((session, channel))

    def _run(self) -> None:
        name_thread("executor")
        try:
            if self._cpus:
                os.sched_setaffinity(0, self._cpus)  # of this thread, and of those that it starts to compute with
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # a thread begins with the first GPU
            with torch.inference_mode():
                while (item := self._inbox.get()) is not None:
                    self._serve(*item)
        except BaseException:
            # Without its executor the daemon is a shell that looks alive.
            self._log.critical("executor_died", exc_info=True)
            os._exit(EXIT_STUCK)

    def _serve(self, session: Session, channel: Channel) -> None:
        self._progress.restart()
        expected = 0
        reason = "the generation ended"
        try:
            while (request := self._next(channel)) is not None and session.reason is None:
                self._check_order(session, request, expected)
                expected += 1
                self._step(session, channel, request)
            if session.reason is None and channel.lost:
                reason = "the coordinator's channel was lost"
                self._generations.orphaned(session)
        except GenerationOver as over:
            reason = str(over)
        self._reports.write()
        wanted = session.reason is not None
        reason = session.reason or reason
        self._generations.broken(session, reason)
        session.end(reason)
        channel.release()
        session.release()
        if not self._intact():
            # Nothing that this process holds can be trusted; a fresh one reads its weights again.
            self._log.critical("device_failed", generation=session.generation, reason=reason)
            os._exit(EXIT_STUCK)
        if wanted:
            self._log.info("generation_ended", generation=session.generation, reason=reason, executed=expected)
        else:
            self._log.warning("generation_broken", generation=session.generation, reason=reason, executed=expected)

    def _next(self, channel: Channel) -> Request | None:
        """What the channel brings next. While that is nothing there is time to tell of what was done."""
        if self._reports.due or (self._reports.pending and not channel.wait(PATIENCE)):
            self._reports.write()
        return channel.receive()

    def _check_order(self, session: Session, request: Request, expected: int) -> None:
        if (request.generation, request.seq) != (session.generation, expected):
            raise GenerationOver(
                f"out of order: command ({request.generation}, {request.seq}) "
                f"came when ({session.generation}, {expected}) was next"
            )

    def _step(self, session: Session, channel: Channel, request: Request) -> None:
        """Run one command and answer it. Raises :class:`GenerationOver` after answering if nothing can follow."""
        response = Response(generation=request.generation, seq=request.seq)
        kind = request.WhichOneof("command") or "none"
        self._progress.begin()
        begun = self._group.stats.begun
        try:
            self._command(kind, channel, request, response)
            verdict = None
        except Exception as error:
            verdict = judge(error)
            if verdict.ours:
                self._log.error("internal_error", generation=session.generation, command=kind, exc_info=True)
        finally:
            self._progress.finish(forward=kind == "execute")
        if verdict is not None:
            self._metrics.command(verdict.code.name)
            if count := self._group.stats.begun - begun:
                verdict = replace(verdict, kind=f"{verdict.kind}@{count}")  # see Failure in shard.proto
            self._fail(session, channel, request, response, verdict)

    def _command(self, kind: str, channel: Channel, request: Request, response: Response) -> None:
        if kind == "execute":
            self._execute(channel, request.execute, response)
            return
        if kind == "activate":
            self._models.activate(request.activate.name, request.activate.version)
            self._log.info("activate", model=request.activate.name, version=request.activate.version)
        elif kind == "unload":
            self._models.unload(request.unload.name, request.unload.version)
            _give_back_freed()
            self._log.info("unload", model=request.unload.name, version=request.unload.version)
        elif kind == "probe":
            self._probe()
        else:
            raise InvalidRequest(f"a command of kind {kind!r} cannot be executed")
        response.done.SetInParent()
        channel.reply(response)
        self._metrics.command("ok")

    def _execute(self, channel: Channel, execute: shard_pb2.ExecuteModel, response: Response) -> None:
        model = self._models.active(execute.model, execute.version)
        model.check_wanted(execute.outputs)
        start = time.perf_counter()
        before = self._group.stats.seconds
        inputs = channel.inputs(execute)
        form = model.served.validate(inputs)
        if model.writes_inputs:
            inputs = {name: value.clone() for name, value in inputs.items()}
        ready = time.perf_counter()
        outputs = self._forward(model.served, inputs, form)
        done = time.perf_counter()
        result = response.execute
        result.SetInParent()
        channel.outputs(execute, response, model.sent(execute.outputs, outputs))
        result.forward_seconds = done - ready
        result.collective_seconds = self._group.stats.seconds - before
        result.copy_seconds = (ready - start) + (time.perf_counter() - done)
        channel.reply(response)
        self._reports.add(
            Forwarded(
                model.metrics,
                response.generation,
                response.seq,
                execute.model,
                ",".join(execute.request_ids),
                time.time(),
                time.perf_counter() - start,
                result.forward_seconds,
                result.collective_seconds,
                result.copy_seconds,
            )
        )

    def _forward(self, served: Served, inputs: dict[str, torch.Tensor], form: Any) -> dict[str, torch.Tensor]:
        try:
            outputs = served.run(inputs, form)
            self._settle()
            return outputs
        except Exception as error:
            if known(error):
                raise
            raise ModelError(f"the model raised {type(error).__name__}: {judge(error).message}") from error

    def _settle(self) -> None:
        """Wait for the device: only then is it known whether its collectives came through. Raises if they did not."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
            if self._group.world_size > 1:
                self._group.backend.check()

    def _probe(self) -> None:
        """Every rank adds its rank + 1; a wrong sum means that the ranks are not where they believe to be."""
        size = self._group.world_size
        value = torch.full((1,), float(self._rank + 1), device=self._device)
        total = float(self._group.all_reduce_sum_(value))
        self._settle()
        if total != size * (size + 1) / 2:
            raise PeerLost(f"the ranks' probe summed to {total}, not to {size * (size + 1) / 2}")

    def _fail(self, session: Session, channel: Channel, request: Request, response: Response, verdict: Verdict) -> None:
        """Answer a failure; free memory if that was the reason; end the generation if it was between the ranks."""
        fields = {"generation": request.generation, "seq": request.seq, "code": verdict.code.name}
        if request.HasField("execute"):
            fields["model"] = request.execute.model
            fields["request_id"] = ",".join(request.execute.request_ids)
        self._log.warning("command_failed", **fields, kind=verdict.kind, error=verdict.message)
        if verdict.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            free_memory(self._device)
        if verdict.collective:
            self._generations.broken(session, verdict.message)
        else:
            self._generations.note(verdict.message)
        message = "internal error; see the daemon's log" if verdict.ours else verdict.message
        failure = shard_pb2.Failure(
            code=verdict.code.value[0], kind=verdict.kind, message=message, collective=verdict.collective
        )
        response.failure.CopyFrom(failure)
        channel.reply(response)
        if verdict.collective:
            raise GenerationOver(verdict.message)


def free_memory(device: torch.device) -> None:
    """Give back what a failed forward held."""
    gc.collect()
    _give_back_freed()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _give_back_freed() -> None:
    from tensor_parallel.checkpoint.memory import give_back_freed  # with much that only a load needs

    give_back_freed()
