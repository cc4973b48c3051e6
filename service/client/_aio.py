"""The client for asyncio: a shell of coroutines around the pure parts."""

# ruff: noqa: ASYNC109 - a timeout is the deadline of the call, which the server learns too

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc.aio
import numpy.typing as npt
from grpc_health.v1 import health_pb2

from service.client import _codec, _models
from service.client._aio_call import AsyncCall
from service.client._aio_gateway import AsyncGateway
from service.client._aio_stream import AsyncStream
from service.client._base import READY_INTERVAL_S, ClientBase, check_timeout, delays, translate
from service.client._channel import HEALTH_CHECK
from service.client._generation import Collector, GenerateArguments, GenerateTerms, Prompt, generate_request
from service.client._terms import SequenceTerms
from service.client.errors import DeadlineExceeded, InvalidArgument, NotFound, Unavailable
from service.client.generated import Generated, Piece
from service.client.info import Emit, ModelInfo, ModelList, Prediction, Priority
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1.rnnserve_pb2_grpc import SequenceServiceStub

GATEWAY_REQUESTS = 64
"""Most requests of a gateway that wait to be written."""


class AsyncClient(ClientBase):
    """Predicts with the models of one server. May be used by many tasks of one event loop.

        async with AsyncClient("localhost:8001") as client:
            prediction = await client.predict("vowels", [x1, x2])
            async with client.stream("vowels") as stream:
                async for y in stream.run(steps):
                    ...

    Every call raises RnnserveError (see service.client.errors). Arrays that come back are read-only views.
    """

    def _prepare(self) -> None:
        self._channel: grpc.aio.Channel | None = None

    def _connected(self) -> None:
        """Make the channel by the first call, since it belongs to the loop that runs then."""
        if self._channel is None:
            options = self._settings.channel_options()
            address = self._settings.address
            self._channel = (
                grpc.aio.secure_channel(address, self._settings.credentials(), options=options)
                if self._settings.is_secure
                else grpc.aio.insecure_channel(address, options=options)
            )
            self._stub: Any = SequenceServiceStub(self._channel)
            self._check = self._channel.unary_unary(
                HEALTH_CHECK,
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )

    async def close(self) -> None:
        """Close the connection; calls and streams in progress end."""
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def predict(
        self,
        model: str,
        xs: _codec.Sequences,
        *,
        version: int = 0,
        outputs: Sequence[str] | None = None,
        emit: Emit = "all",
        states: Mapping[str, npt.ArrayLike] | None = None,
        return_state: bool = False,
        priority: Priority = "normal",
        timeout: float | None = None,
    ) -> Prediction:
        """Run whole sequences of any lengths.

        xs            for each sequence [time, features], or [time] of token ids; of several inputs a dict by name:
                      per-step ones as before, per-sequence ones [sequences, ...], shared ones as they are
        version       of the model; 0 is the newest
        outputs       names of the outputs to answer; None answers all
        emit          "all" steps of per-step outputs, or the "last"
        states        initial states [sequences, directions, hidden] by name; zeros where none are given
        return_state  answer the final states too
        priority      which work of the model goes first: "high", "normal" or "low"
        timeout       seconds for all of it
        Returns one array a sequence: [time, ...], or one row [...] of a per-sequence output or under "last".
        """
        info = await self._find(model, version, timeout)
        request, lengths = _codec.predict_request(
            info,
            xs,
            version=version,
            outputs=outputs,
            emit=emit,
            states=states,
            return_state=return_state,
            priority=priority,
        )
        try:
            response = await self._call("Predict", request, timeout)
        except InvalidArgument:
            self._forget(model, version)
            raise
        if response.digest != info.digest:
            info = self._remember(model, version, await self.model(model, response.version, timeout=timeout))
        return _codec.prediction(info, response, lengths, emit)

    async def generate(
        self,
        model: str,
        inputs: Any = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        **terms: Unpack[GenerateArguments],
    ) -> list[Generated]:
        """Have a model make sequences, one output after another; arguments and answer are those of Client.generate."""
        chosen = GenerateTerms(**terms)
        collector = Collector(await self._find(model, chosen.version, chosen.timeout))
        async for _ in self._generate(generate_request(collector.info, inputs, prompts, chosen), collector):
            pass
        return collector.results()

    async def generate_stream(
        self,
        model: str,
        inputs: Any = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        **terms: Unpack[GenerateArguments],
    ) -> AsyncIterator[Piece]:
        """Yield outputs as they are made; arguments are as for `generate`.

        A piece is what came of one sequence together; its last has the whole of it, as `finished`. Closing the iterator
        ends the call.
        """
        chosen = GenerateTerms(**terms)
        collector = Collector(await self._find(model, chosen.version, chosen.timeout))
        request = generate_request(collector.info, inputs, prompts, chosen)
        async for piece in self._generate(request, collector):
            yield piece

    async def _generate(self, request: pb.GenerateRequest, collector: Collector) -> AsyncIterator[Piece]:
        """Call, and take what comes. The time that the request has is the call's too."""
        timeout = request.timeout.ToNanoseconds() / 1e9 or None
        call = self._stub.Generate(request, timeout=timeout, metadata=self._metadata)
        try:
            async for response in call:
                for piece in collector.take(response):
                    yield piece
        except grpc.aio.AioRpcError as error:
            failure = translate(error)
            if isinstance(failure, InvalidArgument):
                self._forget(request.model, request.version)
            raise failure from None
        finally:
            call.cancel()

    def stream(
        self,
        model: str,
        *,
        version: int = 0,
        outputs: Sequence[str] | None = None,
        emit: Emit = "all",
        step_mode: str | None = None,
        session_id: str = "",
        linger: float = 0.0,
        replay_window: int = 0,
        resume_only: bool = False,
        priority: Priority = "normal",
        states: Mapping[str, npt.ArrayLike] | None = None,
        contexts: Mapping[str, npt.ArrayLike] | None = None,
        timeout: float | None = None,
    ) -> AsyncStream:
        """Prepare a live sequence, for an `async with` block.

        version, outputs, emit  as for `predict`; under "last" a send is answered by its last step
        step_mode      "stepping" to be refused by a model that needs the whole sequence; None takes what it supports
        session_id     name of the session; one that is live is resumed
        linger         seconds that the session outlives its connection; with a session_id, a stream whose connection
                       breaks takes the session up again by itself
        replay_window  steps whose answers the server keeps, so that those under way when the connection broke are not
                       lost; no more are under way at a time
        resume_only    fail with NotFound unless the session is live
        priority       which work of the model goes first: "high", "normal" or "low"
        states         initial states [directions, hidden] by name; zeros where none are given
        contexts       what the model takes once a sequence, [*row_shape] by name
        timeout        seconds to open the stream, and seconds after which a step that has not begun to run is rejected
        """
        check_timeout(timeout)
        terms = SequenceTerms(
            version=version,
            outputs=tuple(outputs or ()),
            emit=emit,
            step_mode=step_mode,
            session_id=session_id,
            linger_s=linger,
            replay_window=replay_window,
            resume_only=resume_only,
            priority=priority,
            states=states or {},
            contexts=contexts or {},
            timeout_s=timeout,
        )
        return AsyncStream(
            dial=self._dial,
            find_model=lambda found: self._find(model, found, timeout),
            terms=terms,
            resume_timeout_s=self._resume_timeout_s,
        )

    def gateway(
        self,
        model: str,
        *,
        version: int = 0,
        outputs: Sequence[str] | None = None,
        emit: Emit = "all",
        step_mode: str | None = None,
        timeout: float | None = None,
    ) -> AsyncGateway:
        """Prepare a stream that carries many sessions, for an `async with` block. Arguments are as for `stream`."""
        check_timeout(timeout)
        terms = SequenceTerms(
            version=version, outputs=tuple(outputs or ()), emit=emit, step_mode=step_mode, timeout_s=timeout
        )
        return AsyncGateway(
            dial=lambda: self._dial(GATEWAY_REQUESTS),
            find_model=lambda found: self._find(model, found, timeout),
            terms=terms,
        )

    async def models(self, *, timeout: float | None = None) -> ModelList:
        """List every model version that is served, and those that are broken."""
        return _models.model_list(await self._call("ListModels", pb.ListModelsRequest(), timeout))

    async def model(self, name: str, version: int = 0, *, timeout: float | None = None) -> ModelInfo:
        """Tell all about one model version; 0 is the newest. Raises NotFound, which names those there are."""
        request = pb.GetModelRequest(model=name, version=version)
        return _models.model_info((await self._call("GetModel", request, timeout)).model)

    async def health(self, service: str = "", *, timeout: float | None = None) -> bool:
        """Tell whether the server, or one model ("name" or "name/version"), is ready to answer.

        A model that it does not know is not ready. Raises Unavailable without a connection.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = await self._call("", request, timeout)
        except NotFound:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def wait_ready(self, timeout: float, service: str = "") -> None:
        """Wait until `health` says yes. Raises Unavailable when that takes more than `timeout` seconds."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + timeout
        why = "it is not serving"
        for delay in delays():
            left_s = give_up_at - loop.time()
            if left_s <= 0:
                break
            try:
                if await self.health(service, timeout=left_s):
                    return
            except (DeadlineExceeded, Unavailable) as error:
                why = error.message
            await asyncio.sleep(max(0.0, min(delay, READY_INTERVAL_S, give_up_at - loop.time())))
        raise Unavailable(f"{self.target} was not ready within {timeout:g} s: {why}", reason="NOT_READY")

    async def _find(self, model: str, version: int, timeout: float | None) -> ModelInfo:
        """What the model takes and answers, asked for once."""
        known = self._infos.get((model, version))
        return known or self._remember(model, version, await self.model(model, version, timeout=timeout))

    def _dial(self, limit: int = 0) -> AsyncCall:
        self._connected()
        return AsyncCall(self._stub.StreamPredict, self._metadata, limit=limit)

    async def _call(self, name: str, request: Any, timeout: float | None) -> Any:
        """Make a unary call of the service by its name; without a name it is the health check."""
        check_timeout(timeout)
        self._connected()
        method = getattr(self._stub, name) if name else self._check
        try:
            return await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise translate(error) from None
