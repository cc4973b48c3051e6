"""The client for threads: a shell of blocking calls around the pure parts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import numpy.typing as npt
from grpc_health.v1 import health_pb2

from service.client import _codec, _models
from service.client._base import READY_INTERVAL_S, ClientBase, check_timeout, delays, translate
from service.client._channel import HEALTH_CHECK
from service.client._generation import Collector, GenerateArguments, GenerateTerms, Prompt, generate_request
from service.client._sync_call import Call
from service.client._sync_gateway import Gateway
from service.client._sync_stream import Stream
from service.client._terms import SequenceTerms
from service.client.errors import DeadlineExceeded, InvalidArgument, NotFound, Unavailable
from service.client.generated import Generated, Piece
from service.client.info import Emit, ModelInfo, ModelList, Prediction, Priority
from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1.rnnserve_pb2_grpc import SequenceServiceStub

GATEWAY_REQUESTS = 64
"""Most requests of a gateway that wait to be written."""


class Client(ClientBase):
    """Predicts with the models of one server. May be used from several threads.

        with Client("localhost:8001") as client:
            prediction = client.predict("vowels", [x1, x2])
            with client.stream("vowels") as stream:
                for y in stream.run(steps):
                    ...

    Every call raises RnnserveError (see service.client.errors). Arrays that come back are read-only views.
    """

    def _prepare(self) -> None:
        options = self._settings.channel_options()
        address = self._settings.address
        self._channel = (
            grpc.secure_channel(address, self._settings.credentials(), options=options)
            if self._settings.is_secure
            else grpc.insecure_channel(address, options=options)
        )
        self._stub: Any = SequenceServiceStub(self._channel)
        self._check = self._channel.unary_unary(
            HEALTH_CHECK,
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    def close(self) -> None:
        """Close the connection; calls and streams in progress end."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def predict(
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
        info = self._find(model, version, timeout)
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
            response = self._call(self._stub.Predict, request, timeout)
        except InvalidArgument:
            self._forget(model, version)
            raise
        if response.digest != info.digest:
            info = self._remember(model, version, self.model(model, response.version, timeout=timeout))
        return _codec.prediction(info, response, lengths, emit)

    def generate(
        self,
        model: str,
        inputs: Any = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        **terms: Unpack[GenerateArguments],
    ) -> list[Generated]:
        """Have a model make sequences, one output after another.

        inputs         what it generates from: of an encoder-decoder a source for each sequence (a text, or ids); of a
                       model with per-sequence inputs those [sequences, ...]; of several inputs a dict by name
        prompts        what is fed first, for each sequence: a text of words of the vocabulary, such words, or ids; a
                       model that takes nothing else may be given them as inputs
        num_sequences  how many to make of one prompt, or of none; None is one
        version        of the model; 0 is the newest
        seed           of the draws: one for each sequence, or a number that counts on; None has the server make them up
        max_steps      most outputs of a sequence; 0 is the model's own limit
        temperature    0 chooses the likeliest id; else ids are drawn
        top_k, top_p   draw among the likeliest ids only; 0 draws among all
        beams          width of a search for the likeliest sequences
        num_hypotheses        of the search to answer, best first: see Generated.others
        length_normalization  power of the length that a hypothesis' log-probability is divided by
        priority       which work of the model goes first: "high", "normal" or "low"
        timeout        seconds for all of it
        Returns what was made, in the order of the sequences.
        """
        chosen = GenerateTerms(**terms)
        collector = Collector(self._find(model, chosen.version, chosen.timeout))
        for _ in self._generate(generate_request(collector.info, inputs, prompts, chosen), collector):
            pass
        return collector.results()

    def generate_stream(
        self,
        model: str,
        inputs: Any = None,
        *,
        prompts: Sequence[Prompt] | None = None,
        **terms: Unpack[GenerateArguments],
    ) -> Iterator[Piece]:
        """Yield outputs as they are made; arguments are as for `generate`.

        A piece is what came of one sequence together; its last has the whole of it, as `finished`. Closing the iterator
        ends the call.
        """
        chosen = GenerateTerms(**terms)
        collector = Collector(self._find(model, chosen.version, chosen.timeout))
        request = generate_request(collector.info, inputs, prompts, chosen)
        yield from self._generate(request, collector)

    def _generate(self, request: pb.GenerateRequest, collector: Collector) -> Iterator[Piece]:
        """Call, and take what comes. The time that the request has is the call's too."""
        timeout = request.timeout.ToNanoseconds() / 1e9 or None
        call = self._stub.Generate(request, timeout=timeout, metadata=self._metadata)
        try:
            for response in call:
                yield from collector.take(response)
        except grpc.RpcError as error:
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
    ) -> Stream:
        """Prepare a live sequence, for a `with` block.

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
        return Stream(
            dial=lambda: Call(self._stub.StreamPredict, self._metadata),
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
    ) -> Gateway:
        """Prepare a stream that carries many sessions, for a `with` block. Arguments are as for `stream`."""
        check_timeout(timeout)
        terms = SequenceTerms(
            version=version, outputs=tuple(outputs or ()), emit=emit, step_mode=step_mode, timeout_s=timeout
        )
        return Gateway(
            dial=lambda: Call(self._stub.StreamPredict, self._metadata, limit=GATEWAY_REQUESTS),
            find_model=lambda found: self._find(model, found, timeout),
            terms=terms,
        )

    def models(self, *, timeout: float | None = None) -> ModelList:
        """List every model version that is served, and those that are broken."""
        return _models.model_list(self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout))

    def model(self, name: str, version: int = 0, *, timeout: float | None = None) -> ModelInfo:
        """Tell all about one model version; 0 is the newest. Raises NotFound, which names those there are."""
        request = pb.GetModelRequest(model=name, version=version)
        return _models.model_info(self._call(self._stub.GetModel, request, timeout).model)

    def health(self, service: str = "", *, timeout: float | None = None) -> bool:
        """Tell whether the server, or one model ("name" or "name/version"), is ready to answer.

        A model that it does not know is not ready. Raises Unavailable without a connection.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            response = self._call(self._check, request, timeout)
        except NotFound:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_ready(self, timeout: float, service: str = "") -> None:
        """Wait until `health` says yes. Raises Unavailable when that takes more than `timeout` seconds."""
        give_up_at = time.monotonic() + timeout
        why = "it is not serving"
        for delay in delays():
            left_s = give_up_at - time.monotonic()
            if left_s <= 0:
                break
            try:
                if self.health(service, timeout=left_s):
                    return
            except (DeadlineExceeded, Unavailable) as error:
                why = error.message
            time.sleep(max(0.0, min(delay, READY_INTERVAL_S, give_up_at - time.monotonic())))
        raise Unavailable(f"{self.target} was not ready within {timeout:g} s: {why}", reason="NOT_READY")

    def _find(self, model: str, version: int, timeout: float | None) -> ModelInfo:
        """What the model takes and answers, asked for once."""
        known = self._infos.get((model, version))
        return known or self._remember(model, version, self.model(model, version, timeout=timeout))

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        check_timeout(timeout)
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise translate(error) from None
