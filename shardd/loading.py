"""Loads, beside the executor: one at a time, on a thread of its own, with progress; cancelled when its caller leaves.

A load that fails changes nothing: what is loaded stays, and keeps serving.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from protos.tensor_parallel.v1 import shard_pb2
from shardd.errors import InvalidRequest, LoadCancelled, Verdict, WrongState, judge
from shardd.logging import Logger
from shardd.metrics import Metrics
from shardd.models import Model, Models, Served, check_digests

UPDATE_SECONDS = 0.1
"""Progress is told at most this often."""
ALIVE_SECONDS = 1.0
"""And at least this often, so that planning a large model does not look like a hang."""

Report = Callable[[str, int, int], None]
"""``(stage, bytes_done, bytes_total)``."""


@dataclass(frozen=True)
class LoadedWeights:
    """What a reader made of a request; see :class:`~shardd.models.Model`."""

    served: Served
    description: shard_pb2.LoadedModel
    outputs: dict[str, bool]
    first: bool
    writes_inputs: bool
    checksum: int | None
    bytes_read: int
    warnings: list[str]
    functions_compiled: int | None = None


Read = Callable[[shard_pb2.ShardLoadRequest, Report, Callable[[], bool]], LoadedWeights]
"""Plans and reads a model; ``shardd.reading`` does it with the library. Raises ``LoadCancelled`` when asked to stop."""


class LoadFailed(Exception):
    """A load ended in an error, already judged and logged."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.message)
        self.verdict = verdict


class Loader:
    """Runs loads. Safe from any thread."""

    def __init__(
        self, models: Models, metrics: Metrics, read: Read, log: Logger, failed: Callable[[str], None]
    ) -> None:
        self._models = models
        self._metrics = metrics
        self._read = read
        self._log = log
        self._failed = failed
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._jobs: dict[tuple[str, str], list[_Job]] = {}

    def load(
        self, request: shard_pb2.ShardLoadRequest, gone: Callable[[Callable[[], None]], bool]
    ) -> Iterator[shard_pb2.ShardLoadProgress]:
        """Load as asked and tell how it goes; the last message carries the model. Returns at once what is loaded.

        ``gone(f)`` arranges that ``f`` is called when the caller leaves. Raises :class:`LoadFailed`.
        """
        if not request.name or not request.version or not request.path:
            raise InvalidRequest("a load needs a name, a version and a path")
        job = _Job(request)
        key = (request.name, request.version)
        with self._lock:
            self._jobs.setdefault(key, []).append(job)
        self._models.begin_load(*key)
        if not gone(lambda: self._abandon(job)):
            self._abandon(job)
        threading.Thread(target=self._run, args=(job,), name="load", daemon=True).start()
        yield from job.updates()

    def prepare(self, warm: Callable[[], None]) -> None:
        """Run ``warm`` in the background as if it were a load: the first real one waits for it."""

        def run() -> None:
            with self._turn:
                try:
                    warm()
                except Exception:
                    self._log.warning("warm_up_failed", exc_info=True)

        threading.Thread(target=run, name="warm-up", daemon=True).start()

    def cancel(self, name: str, version: str) -> None:
        """Stop a running load of this version, or forget the version if it was loaded and never active."""
        with self._lock:
            jobs = list(self._jobs.get((name, version), ()))
        for job in jobs:
            self._abandon(job)
        if self._models.discard(name, version):
            give_back()
            self._log.info("load_discarded", model=name, version=version)

    def cancel_all(self) -> None:
        """Stop every load: the daemon is shutting down."""
        with self._lock:
            jobs = [job for several in self._jobs.values() for job in several]
        for job in jobs:
            self._abandon(job)

    def _abandon(self, job: _Job) -> None:
        """Tell the caller that its load is over. The load itself ends when it next looks; what it read is freed."""
        if self._finish(job, None):
            job.fail(LoadFailed(judge(LoadCancelled("the load was cancelled"))))

    def _run(self, job: _Job) -> None:
        request = job.request
        failure: Verdict | None = None
        model: Model | None = None
        fresh = False
        try:
            with self._turn:
                model = self._existing(request)
                if model is None:
                    model = self._load(job)
                    fresh = True
                check_digests(
                    model.description,
                    request.expected_source_digest,
                    request.expected_plan_digest,
                    request.expected_shard_digest,
                    request.name,
                )
        except Exception as error:
            failure = self._judge(request, error)
        kept = self._finish(job, model if fresh and failure is None else None)
        if failure is not None:
            job.fail(LoadFailed(failure))
        elif kept and model is not None:
            job.succeed(model.describe())
        if failure is not None or not kept:
            model = None
            give_back()  # tracebacks and half-read weights

    def _finish(self, job: _Job, model: Model | None) -> bool:
        """The job is over, with ``model`` or without; whether it was not over before."""
        key = (job.request.name, job.request.version)
        with self._lock:
            jobs = self._jobs.get(key, [])
            if job not in jobs:
                return False
            jobs.remove(job)
            last = not jobs
            if last:
                del self._jobs[key]
            self._models.end_load(*key, model, loading=not last)
        return True

    def _existing(self, request: shard_pb2.ShardLoadRequest) -> Model | None:
        """The version, if it is here already. Raises :class:`WrongState` if it was loaded from something else."""
        model = self._models.get(request.name, request.version)
        if model is not None and model.fingerprint != fingerprint(request):
            raise WrongState(
                f"model {request.name!r} version {request.version!r} is loaded from another path or with "
                "other options; load it under a new version"
            )
        return model

    def _load(self, job: _Job) -> Model:
        request = job.request
        self._log.info("load_started", model=request.name, version=request.version, path=request.path)
        start = time.perf_counter()
        reading: list[float] = []

        def report(stage: str, done: int, total: int) -> None:
            if stage == "reading":  # the last time: what follows, such as planning for branches, is not reading
                reading.append(time.perf_counter())
            job.report(stage, done, total)

        weights = self._read(request, report, job.cancelled)
        served = weights.served
        end = time.perf_counter()
        took = reading[-1] - reading[0] if reading else 0.0
        self._log.info(
            "load_finished",
            model=request.name,
            version=request.version,
            seconds=round(end - start, 3),
            reading_seconds=round(took, 3),
            bytes_held=served.bytes_held,
            bytes_read=weights.bytes_read,
            bytes_per_second=int(served.bytes_held / took) if took else 0,
            functions_compiled=weights.functions_compiled,
            planned_by=served.planned_by,
            warnings=weights.warnings,
        )
        self._metrics.loaded(served.bytes_held)
        job.warnings = weights.warnings
        return Model(
            name=request.name,
            version=request.version,
            fingerprint=fingerprint(request),
            served=served,
            outputs=weights.outputs,
            description=weights.description,
            metrics=self._metrics.model(request.name),
            first=weights.first,
            writes_inputs=weights.writes_inputs,
            checksum=weights.checksum,
        )

    def _judge(self, request: shard_pb2.ShardLoadRequest, error: Exception) -> Verdict:
        verdict = judge(error)
        message = f"model {request.name!r}: {verdict.message}"
        self._log.warning(
            "load_failed",
            model=request.name,
            version=request.version,
            code=verdict.code.name,
            error=verdict.message,
            exc_info=verdict.ours,
        )
        self._failed(message)
        error.__traceback__ = None  # it holds the frames, and they the weights
        return verdict


class _Job:
    """One load: its latest progress, whether to stop, and how it ended."""

    def __init__(self, request: shard_pb2.ShardLoadRequest) -> None:
        self.request = request
        self.warnings: list[str] = []
        self.finished = threading.Event()
        self._changed = threading.Condition()
        self._progress = shard_pb2.ShardLoadProgress(stage="planning")
        self._told: shard_pb2.ShardLoadProgress | None = None
        self._error: LoadFailed | None = None

    def cancelled(self) -> bool:
        """Whether nobody waits for this load any more."""
        return self._error is not None

    def report(self, stage: str, done: int, total: int) -> None:
        with self._changed:
            self._progress = shard_pb2.ShardLoadProgress(stage=stage, bytes_done=done, bytes_total=total)
            self._changed.notify()

    def succeed(self, model: shard_pb2.LoadedModel) -> None:
        size = model.bytes_held
        with self._changed:
            self._progress = shard_pb2.ShardLoadProgress(
                stage="loaded", bytes_done=size, bytes_total=size, model=model, warnings=self.warnings
            )
            self.finished.set()
            self._changed.notify()

    def fail(self, error: LoadFailed) -> None:
        with self._changed:
            self._error = error
            self.finished.set()
            self._changed.notify()

    def updates(self) -> Iterator[shard_pb2.ShardLoadProgress]:
        """Progress as it changes, and now and then when it does not, to the end. Raises what the load ended with."""
        while True:
            with self._changed:
                self._changed.wait_for(self._news, ALIVE_SECONDS)
                if self._error is not None:
                    raise self._error
                self._told = progress = self._progress
            yield progress
            if progress.stage == "loaded":
                return
            self.finished.wait(UPDATE_SECONDS)

    def _news(self) -> bool:
        return self.finished.is_set() or self._progress is not self._told


def give_back() -> None:
    """Collect what is in cycles, and return what is free to the system."""
    from tensor_parallel.checkpoint.memory import give_back_freed  # with torch, which a load has imported by now

    gc.collect()
    give_back_freed()


def fingerprint(request: shard_pb2.ShardLoadRequest) -> bytes:
    """What decides what a load makes: the path and the options. A plan only saves making it."""
    return request.path.encode() + b"\0" + request.options.SerializeToString(deterministic=True)
