"""What happened, when: requests, faults and health samples on one monotonic clock, and the figures read off them."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

HEALTH_LAG = 2.0  # seconds for which health may still tell the old truth
REFUTED_WITHIN = 0.25  # seconds after a sample within which a Forward is sent, and fails, if the sample was false
NOTICE_WINDOW = 0.25  # a request sent this long after a kill still counts as waiting when it struck


@dataclass(frozen=True, slots=True)
class Answer:
    start: float
    end: float
    outcome: str  # ok, wrong, or a grpc status name
    retried: bool = False  # by a client whose retries were on
    detail: str = ""


@dataclass(slots=True)
class Fault:
    kind: str
    at: float
    target: str
    serving_again: float | None = None  # seconds from the fault
    wall: float = 0.0  # when, by the clock that logs tell
    restarted: float | None = None  # seconds from the fault until the replacement was started


@dataclass(frozen=True, slots=True)
class Sample:
    at: float
    serving: bool
    reason: str


@dataclass
class Timeline:
    answers: list[Answer] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, answer: Answer) -> None:
        with self.lock:
            self.answers.append(answer)

    def outcomes(self) -> Counter[str]:
        return Counter(answer.outcome for answer in self.answers)

    def counted(self) -> dict[str, int]:
        """How many, of each kind of answer; every run has these."""
        counts = self.outcomes()
        named = ("ok", "UNAVAILABLE", "wrong", "DEADLINE_EXCEEDED")
        return {
            "faults": len(self.faults),
            "requests": len(self.answers),
            "ok": counts["ok"],
            "unavailable": counts["UNAVAILABLE"],
            "wrong": counts["wrong"],
            "past_deadline": counts["DEADLINE_EXCEEDED"],
            "other": sum(counts.values()) - sum(counts[name] for name in named),
            "retrying_failed": sum(a.retried and a.outcome != "ok" for a in self.answers),
            "health_lies": len(self.lies()),
        }

    def again(self, kind: str) -> list[float]:
        """Seconds until it served again, of each fault of ``kind``."""
        return [f.serving_again for f in self.faults if f.kind == kind and f.serving_again is not None]

    def restarted(self, kind: str) -> list[float]:
        """The same, counted from the restart of what was killed."""
        return [
            f.serving_again - f.restarted
            for f in self.faults
            if f.kind == kind and f.serving_again is not None and f.restarted is not None
        ]

    def notices(self, kind: str) -> list[float]:
        """Seconds from each fault of ``kind`` to UNAVAILABLE at each client that was waiting, sorted."""
        taken = []
        for fault in (f for f in self.faults if f.kind == kind):
            for answer in self.answers:
                waiting = answer.start < fault.at + NOTICE_WINDOW and answer.end > fault.at
                if waiting and not answer.retried and answer.outcome == "UNAVAILABLE":
                    taken.append(answer.end - max(fault.at, answer.start))
        return sorted(taken)

    def outages(self) -> list[tuple[float, float]]:
        """Spans from the first failed answer after a success to the next success (clients without retries)."""
        spans, began = [], None
        for answer in sorted((a for a in self.answers if not a.retried), key=lambda a: a.end):
            if answer.outcome == "ok":
                if began is not None:
                    spans.append((began, answer.end))
                began = None
            elif began is None:
                began = answer.end
        if began is not None:
            spans.append((began, time.monotonic()))
        return spans

    def lies(self) -> list[str]:
        """Samples that said SERVING when every Forward had been failing for more than HEALTH_LAG seconds, and one sent
        right after the sample failed too: else it told of the recovery before the first answer did.
        """
        samples = sorted(self.samples, key=lambda s: s.at)
        times = [sample.at for sample in samples]
        failed = sorted(a.start for a in self.answers if a.outcome != "ok" and not a.retried)
        found = []
        for began, ended in self.outages():
            for sample in samples[bisect_left(times, began + HEALTH_LAG) : bisect_left(times, ended)]:
                later = bisect_left(failed, sample.at)
                refuted = later < len(failed) and failed[later] < min(sample.at + REFUTED_WITHIN, ended)
                if sample.serving and refuted:
                    found.append(f"SERVING {sample.at - began:.2f} s into an outage of {ended - began:.2f} s")
        return found


def percentile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
