"""Sees every gRPC call begin and end: gives it its facts, counts it by gRPC's proposal A66, and tells observers of it.

Counted are how many began, how each ended, how long it took, and how much it carried. grpcio-observability would count
the same in gRPC's core, but names no method of an asyncio server, and wants one exact version of grpcio; this needs
nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from inspect import isasyncgenfunction
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import grpc
import grpc.aio

from service.facts import CALL, REQUEST_ID_KEY, CallFacts
from service.rpc.handlers import MAKERS
from service.tally import CallTally

if TYPE_CHECKING:
    Handler: TypeAlias = grpc.RpcMethodHandler[Any, Any]

Context = grpc.aio.ServicerContext[Any, Any]
Behavior = Callable[[Any, Context], Any]
OTHER = "other"
"""Stands for every method that the server does not have: a stranger may call as many as he likes."""
LATE_S = 0.02
"""A call that its client ends when so little is left of its timeout is over its deadline."""
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class CallObserver(Protocol):
    """Is told of calls."""

    def begin(self, facts: CallFacts, details: grpc.HandlerCallDetails) -> None:
        """A call begins; called in its context."""

    def end(self, facts: CallFacts) -> None:
        """It has ended, with all that there is to know of it."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Sees every call; it goes first, to see the status that others end a call with."""

    def __init__(self, tally: CallTally, observers: Sequence[CallObserver] = ()) -> None:
        self._tally = tally
        self._observers = observers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            self._tally.begin(OTHER)
            self._tally.end(OTHER, grpc.StatusCode.UNIMPLEMENTED.name, 0.0, 0, 0)
            self._tell_unknown(handler_call_details)
            return None
        call = _Call(self._tally, self._observers, handler_call_details)
        read, write = call.reader(handler), call.writer(handler)
        for kind, make in MAKERS.items():
            if behavior := getattr(handler, kind):
                if handler.response_streaming:
                    return make(call.wrap(behavior), read, write)
                return make(call.wrap(behavior, write), read)  # gRPC would write the answer after the end
        return handler

    def _tell_unknown(self, details: grpc.HandlerCallDetails) -> None:
        """Tell of a call of a method that the server does not have."""
        if self._observers:
            facts = CallFacts(OTHER, details.invocation_metadata)
            facts.status = grpc.StatusCode.UNIMPLEMENTED.name
            for observer in self._observers:
                observer.begin(facts, details)
            for observer in self._observers:
                observer.end(facts)


class _Call:
    """One call under way."""

    __slots__ = (
        "_began_at",
        "_details",
        "_facts",
        "_num_read",
        "_num_written",
        "_observers",
        "_received",
        "_sent",
        "_tally",
    )

    def __init__(self, tally: CallTally, observers: Sequence[CallObserver], details: grpc.HandlerCallDetails) -> None:
        self._tally = tally
        self._observers = observers
        self._details = details
        self._facts = CallFacts(details.method.lstrip("/"), details.invocation_metadata)
        self._began_at = time.perf_counter()
        self._sent = self._received = 0
        self._num_read = self._num_written = 0  # messages, where there are observers
        tally.begin(self._facts.method)

    def reader(self, handler: Handler) -> Callable[[bytes], Any]:
        """Read messages as the handler does, and count their bytes."""
        read = handler.request_deserializer

        def count(raw: bytes) -> Any:
            self._received += len(raw)
            return raw if read is None else read(raw)

        def count_both(raw: bytes) -> Any:
            self._num_read += 1
            return count(raw)

        return count_both if self._observers else count

    def writer(self, handler: Handler) -> Callable[[Any], bytes]:
        """Write messages as the handler does, and count their bytes."""
        write = handler.response_serializer

        def count(message: Any) -> bytes:
            raw: bytes = message if write is None else write(message)
            self._sent += len(raw)
            return raw

        def count_both(message: Any) -> bytes:
            self._num_written += 1
            return count(message)

        return count_both if self._observers else count

    def wrap(self, behavior: Behavior, write: Callable[[Any], bytes] | None = None) -> Behavior:
        """Count the end of the call.

        write  turns what a behavior with one response returns into a message
        """
        if isasyncgenfunction(behavior):

            async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
                self._begin()
                try:
                    async for response in behavior(request, context):
                        yield response
                except BaseException as error:
                    self._end(context, error)
                    raise
                self._end(context, None)

            return generate

        async def answer(request: Any, context: Context) -> Any:
            self._begin()
            try:
                response = await behavior(request, context)
                if write is not None:
                    response = write(response)
            except BaseException as error:
                self._end(context, error)
                raise
            self._end(context, None)
            return response

        return answer

    def _begin(self) -> None:
        """Let whatever the call's task does know what it is for: the task is its own."""
        CALL.set(self._facts)
        for observer in self._observers:
            observer.begin(self._facts, self._details)

    def _end(self, context: Context, error: BaseException | None) -> None:
        facts, seconds = self._facts, time.perf_counter() - self._began_at
        status = _status(context, error, seconds)
        self._tally.end(facts.method, status, seconds, self._sent, self._received)
        if self._observers:
            facts.status, facts.seconds, facts.peer = status, seconds, context.peer()
            facts.bytes_in, facts.bytes_out = self._received, self._sent
            facts.messages_in, facts.messages_out = self._num_read, self._num_written
            for observer in self._observers:
                observer.end(facts)
        if error is None and facts.is_named:
            context.set_trailing_metadata(((REQUEST_ID_KEY, facts.request_id),))


def _status(context: Context, error: BaseException | None, seconds: float) -> str:
    """The status that the server ends a call with."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        left_s = context.time_remaining()
        # The client's clock began earlier, and its timeout travels rounded up by a hundredth at most.
        is_late = left_s is not None and left_s <= max(LATE_S, (seconds + left_s) / 100)
        return (grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED).name
    code: Any = context.code()
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code
    if error is not None and not number:
        return grpc.StatusCode.UNKNOWN.name
    return _NAMES.get(number or 0, grpc.StatusCode.UNKNOWN.name)
