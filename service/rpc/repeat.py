"""Recognises frames that differ from an earlier one in nothing but the rows: protobuf need not parse them again.

Protobuf writes fields in the order of their numbers, and the bytes of a tensor come after all that most frames say. So
such a message is a head, which tells everything else and how long the bytes are, and then the bytes. A message of the
same length with the same head says the same. Positions stand in the head and grow by one a frame: the next head is
foretold.
"""

from __future__ import annotations

from functools import lru_cache

from service.crews import Crew
from service.events import Steps
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb

CREW_SESSIONS = 4
"""Fewest sessions of a frame that are worth counting together."""


class Repeat:
    """A frame of one step for each of some sessions, as a pattern for those that follow."""

    __slots__ = ("_after", "_before", "_crew", "_head", "_link", "_num_bytes", "_position", "_sessions", "_version")

    def __init__(self, steps: Steps, frame: pb.StreamFrame) -> None:
        """Learn from a frame and the steps that were read from it; `tells` says whether it is a pattern."""
        tensor = frame.tensors[0]
        self._link = steps.link
        self._version = steps.link.version
        self._sessions = steps.sessions
        self._crew = Crew(steps.sessions) if len(steps.sessions) >= CREW_SESSIONS else None
        self._num_bytes = len(tensor.data)
        self._before = pb.StreamFrame(handles=frame.handles).SerializeToString()
        rows = pb.Tensor(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            layout=tensor.layout,
            lengths=tensor.lengths,
            data=tensor.data,
        )
        after = pb.StreamFrame(lengths=frame.lengths, tensors=[rows]).SerializeToString()
        self._after = after[: len(after) - self._num_bytes]
        self._position = frame.positions[0] if frame.positions else None
        self._head = self._make_head()

    def tells(self, raw: bytes, frame: pb.StreamFrame) -> bool:
        """Whether the message that it was learned from is the pattern and the rows, byte for byte, and says no more.

        If so, the next one is expected.
        """
        if raw != self._head + frame.tensors[0].data:
            return False
        self._go_on()
        return True

    def read(self, raw: bytes) -> Steps | None:
        """Read a message that follows the pattern; None for any other."""
        head = self._head
        if not raw.startswith(head) or len(raw) != len(head) + self._num_bytes or self._version != self._link.version:
            return None
        positions = None if self._position is None else [self._position] * len(self._sessions)
        self._go_on()
        return Steps(self._link, self._sessions, positions, None, [raw[len(head) :]], crew=self._crew)

    def _go_on(self) -> None:
        if self._position is not None:
            self._position += 1
            self._head = self._make_head()

    def _make_head(self) -> bytes:
        """All of the message before the rows."""
        body = self._before
        if self._position is not None:
            position, num = varint(self._position), len(self._sessions)
            body += _POSITIONS_TAG + varint(num * len(position)) + position * num
        body += self._after
        return _FRAME_TAG + varint(len(body) + self._num_bytes) + body


_PACKED = 2  # wire type of everything that has a length
_FRAME_TAG = bytes([pb.StreamPredictRequest.FRAME_FIELD_NUMBER << 3 | _PACKED])
_POSITIONS_TAG = bytes([pb.StreamFrame.POSITIONS_FIELD_NUMBER << 3 | _PACKED])


def learn(steps: Steps, raw: bytes, frame: pb.StreamFrame) -> Repeat | None:
    """Make a pattern of a frame that was read as one step for each of some sessions; None if it can't be one."""
    if len(frame.tensors) != 1 or steps.lengths is not None or not steps.sessions:
        return None
    repeat = Repeat(steps, frame)
    return repeat if repeat.tells(raw, frame) else None


@lru_cache(maxsize=4096)
def varint(value: int) -> bytes:
    """Encode a number as protobuf does: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
