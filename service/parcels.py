"""A live session on its way to another process: `give` takes it out of a lane, `adopt` puts it into another.

Laws:

    a session that is adopted goes on where it was given, bit for bit, replays included
    a session that is given is over in its lane, and its slot is free
    unpack(pack(parcels)) equals parcels

The bytes are the size of a head (8 bytes, little-endian), the head (JSON), and the elements of all arrays in the order
in which the head names their types and shapes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from service.entries import Entries
from service.errors import SpillLost
from service.events import Answer, Link
from service.lane import Lane
from service.policies import Priority
from service.sessions import Kept, Terms
from service.tally import Cause
from service.tensors import DTYPES, Array, decode, dtype_name, encode

_SIZE_BYTES = 8


@dataclass(slots=True)
class Parcel:
    """All that a session is, but for its name on a stream."""

    terms: Terms
    position: int
    """That it expects next."""
    kept_from: int
    kept: Kept | None
    """Answers for a resend, in one piece."""
    used_at: float
    """When its last step came, on the clock that all processes of a machine share."""
    states: list[Array]
    """A row of each."""
    gathered: list[Array]
    """Per-step inputs of a sequence that waits to be whole, [steps, ...]; empty if there are none."""
    given: list[Array]
    """What it was given once, if its model takes something so."""
    answers: list[Answer]
    """Of steps that were still queued when another stream asked for the session: they are for that stream."""


class Leaving(NamedTuple):
    """An open session that has nothing queued, and is to be given away."""

    link: Link
    handle: int
    answers: list[Answer]


def give(lane: Lane, leaving: Sequence[Leaving]) -> list[Parcel]:
    """Take sessions out of their lane, and end them there; those whose state is lost are ended and left out.

    Raises RunFailed where states can't be read, and then all of them stay.
    """
    sessions = [each.link.sessions[each.handle] for each in leaving]
    slots = [session.slot for session in sessions]
    try:
        states = lane.slab.read(np.array(slots, dtype=np.int64)) if slots else []
    except SpillLost as error:
        if len(leaving) > 1:
            return [parcel for each in leaving for parcel in give(lane, [each])]
        lane.lose(slots, error)
        return []
    parcels = []
    for row, (session, each) in enumerate(zip(sessions, leaving, strict=True)):
        kept = None
        if session.kept:
            start = session.kept[0].position
            kept = Kept(start, session.applied - start, session.kept_rows(start, session.applied))
        parcel = Parcel(
            terms=session.terms,
            position=session.expected,
            kept_from=session.kept_from,
            kept=kept,
            used_at=session.used_at,
            states=[rows[row] for rows in states],
            gathered=lane.gathered.take(session),
            given=[] if lane.constants is None else lane.constants.read(session.slot),
            answers=each.answers,
        )
        parcels.append(parcel)
        lane.close(each.link, each.handle)
        lane.tally.sessions_ended[Cause.CLOSED] -= 1  # it goes on elsewhere
    return parcels


def adopt(lane: Lane, link: Link, parcel: Parcel, now: float) -> None:
    """Go on with a session in a lane of the same model file. Raises Exhausted."""
    handle, _, _ = lane.open(link, parcel.terms, now, parcel.given)
    lane.tally.sequences -= 1  # it did not begin here
    lane.tally.sessions_opened -= 1
    session = link.sessions[handle]
    num_gathered = len(parcel.gathered[0]) if parcel.gathered else 0
    session.sent = session.expected = parcel.position
    session.applied = parcel.position - num_gathered
    session.kept_from = parcel.kept_from
    if session.kept is not None and parcel.kept is not None:
        session.kept.append(parcel.kept)
    for index, row in enumerate(parcel.states):
        lane.slab.write(session.slot, index, row)
    if num_gathered:
        lane.gathered.add(Entries([session], [num_gathered], [0], None, None, parcel.gathered))


def pack(parcels: Sequence[Parcel]) -> bytes:
    """Write parcels as bytes."""
    blobs: list[bytes] = []

    def write(arrays: Sequence[Array]) -> list[tuple[str, tuple[int, ...]]]:
        blobs.extend(encode(array) for array in arrays)
        return [(dtype_name(array), array.shape) for array in arrays]

    head = [
        {
            "session_id": parcel.terms.session_id,
            "linger_s": parcel.terms.linger_s,
            "replay_window": parcel.terms.replay_window,
            "priority": parcel.terms.priority,
            "position": parcel.position,
            "kept_from": parcel.kept_from,
            "used_at": parcel.used_at,
            "states": write(parcel.states),
            "gathered": write(parcel.gathered),
            "given": write(parcel.given),
            "kept": parcel.kept and [parcel.kept.position, parcel.kept.num_steps, write(parcel.kept.outputs)],
            "answers": [[each.positions, each.lengths, write(each.outputs)] for each in parcel.answers],
        }
        for parcel in parcels
    ]
    text = json.dumps(head).encode()
    return b"".join([len(text).to_bytes(_SIZE_BYTES, "little"), text, *blobs])


def unpack(data: bytes) -> list[Parcel]:
    """Read what `pack` wrote; arrays are views of the data."""
    view = memoryview(data)
    at = _SIZE_BYTES + int.from_bytes(view[:_SIZE_BYTES], "little")
    head = json.loads(bytes(view[_SIZE_BYTES:at]))

    def read(described: list[Any]) -> list[Array]:
        nonlocal at
        arrays = []
        for name, shape in described:
            start, at = at, at + int(np.prod(shape, dtype=np.int64)) * DTYPES[name].itemsize
            arrays.append(decode(view[start:at], name, shape))
        return arrays

    def parcel_of(entry: dict[str, Any]) -> Parcel:
        terms = Terms(
            session_id=entry["session_id"],
            linger_s=entry["linger_s"],
            replay_window=entry["replay_window"],
            priority=Priority(entry["priority"]),
        )
        states, gathered, given = (read(entry[name]) for name in ("states", "gathered", "given"))
        kept = entry["kept"]
        return Parcel(
            terms=terms,
            position=entry["position"],
            kept_from=entry["kept_from"],
            kept=kept and Kept(kept[0], kept[1], read(kept[2])),
            used_at=entry["used_at"],
            states=states,
            gathered=gathered,
            given=given,
            answers=[Answer([0], positions, lengths, read(rows)) for positions, lengths, rows in entry["answers"]],
        )

    return [parcel_of(entry) for entry in head]
