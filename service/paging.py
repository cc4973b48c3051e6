"""Batches of sequences whose states are all in memory, out of a scheduler that does not ask where they are.

A batch with states in the spill store is given in parts: first what is in memory and what is brought back for it, then
the rest, in the same way. So each part keeps the event loop for as long only as `Residence.most_moved` states take, and
there may be more sessions in a batch than have room. Laws:

    every row of the scheduler's batches is in one part, or refused: never both, never twice
    where no other run is under way, there is always a part or a refusal
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from service.errors import RunFailed, ServiceError
from service.residence import Residence
from service.scheduler import Batch, Scheduler

log = logging.getLogger(__name__)


class Pager:
    """Stands between a lane and its scheduler."""

    def __init__(
        self, residence: Residence, scheduler: Scheduler, refuse: Callable[[int, ServiceError, float], None]
    ) -> None:
        """Give all batches of the scheduler.

        refuse  told the slots whose states can't be had, why, and the time; nothing is queued for them any more
        """
        self._residence = residence
        self._scheduler = scheduler
        self._refuse = refuse
        self._rest: Batch | None = None

    def next_batch(self, now: float) -> Batch | None:
        """Take the next rows to run, as Scheduler.next_batch does; None also where runs under way hold all the room."""
        while True:
            batch = self._rest or self._scheduler.next_batch()
            self._rest = None
            if batch is None or not (absent := self._residence.absent(batch.slots)):
                return batch
            try:
                outcome = self._residence.bring_back(absent)
            except Exception:
                log.exception("a bug in bringing states back")
                outcome = dict.fromkeys(absent, RunFailed("the server failed to run this step; its log says how"))
            waiting = set(absent).difference(outcome)
            refused = {slot: error for slot, error in outcome.items() if error is not None}
            rows = range(len(batch.slots))
            if waiting:
                self._rest = batch.part([row for row in rows if batch.slots[row] in waiting])
            for row in rows:
                if error := refused.get(batch.slots[row]):
                    self._scheduler.cancel(batch.slots[row])
                    self._scheduler.complete(batch.part([row]))
                    self._refuse(batch.slots[row], error, now)
            ready = [row for row in rows if batch.slots[row] not in waiting and batch.slots[row] not in refused]
            if ready:
                return batch.part(ready)
            if not refused:
                return None
