"""GRPCInferenceService: the Open Inference Protocol and extensions of Triton, on the same engine as the native API."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Any

import grpc
import grpc.aio

from service.engine import Engine
from service.errors import InvalidInput, ModelNotFound, ServiceError, Unimplemented
from service.events import Event, Link
from service.facts import current
from service.pb.inference import inference_pb2 as pb
from service.pb.inference import inference_pb2_grpc as pb_grpc
from service.rpc.catalog import Catalog
from service.rpc.fleet import Forwarding
from service.rpc.handlers import unary_handlers
from service.rpc.handoff import Handoff
from service.rpc.oip.describe import EXTENSIONS, config_of, index_of, metadata_of
from service.rpc.oip.desk import Desk
from service.rpc.oip.inference import Inference
from service.rpc.oip.stream import InferStream

_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]
SERVICE_NAME = _SERVICE.full_name
ABSENT = {
    "SystemSharedMemoryStatus": "shared memory",
    "SystemSharedMemoryRegister": "shared memory",
    "SystemSharedMemoryUnregister": "shared memory",
    "CudaSharedMemoryStatus": "shared memory",
    "CudaSharedMemoryRegister": "shared memory",
    "CudaSharedMemoryUnregister": "shared memory",
    "TraceSetting": "changing traces while it serves",
    "LogSettings": "changing logs while it serves",
}
"""Calls of Triton that are not there, and what they are about."""
Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(pb_grpc.GRPCInferenceServiceServicer):
    """Maps requests to the engine and results to responses."""

    def __init__(self, engine: Engine, catalog: Catalog | Forwarding, handoff: Handoff | None = None) -> None:
        self._engine = engine
        self._catalog = catalog
        self.desk = Desk(engine, handoff)
        """Where its requests come in."""

    async def ServerLive(self, request: pb.ServerLiveRequest, context: Context) -> pb.ServerLiveResponse:
        """Say that the process answers."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: Context) -> pb.ServerReadyResponse:
        """Say whether new work is taken."""
        return pb.ServerReadyResponse(ready=not self._engine.is_draining)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: Context) -> pb.ModelReadyResponse:
        """Say whether a model version is served."""
        try:
            self.desk.lane(request.name, request.version)
        except ModelNotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=not self._engine.is_draining)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: Context) -> pb.ServerMetadataResponse:
        """Say who answers."""
        return pb.ServerMetadataResponse(name="rnnserve", version=version("rnnserve"), extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: Context) -> pb.ModelMetadataResponse:
        """Describe a model's tensors."""
        lane = self.desk.lane(request.name, request.version)
        return metadata_of(lane, [each.version for each in self._engine.lanes if each.name == lane.name])

    async def ModelConfig(self, request: pb.ModelConfigRequest, context: Context) -> pb.ModelConfigResponse:
        """Describe how a model is served."""
        return pb.ModelConfigResponse(config=config_of(self.desk.lane(request.name, request.version)))

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, context: Context) -> pb.ModelStatisticsResponse:
        """Tell the counts of one version of a model, of all of its versions, or of all models."""
        lanes = self._engine.lanes
        if request.version or request.name:
            wanted = self.desk.lane(request.name, request.version)
            lanes = [each for each in lanes if each.name == wanted.name and (not request.version or each is wanted)]
        response = pb.ModelStatisticsResponse()
        for lane in lanes:
            message = response.model_stats.add(name=lane.name, version=str(lane.version))
            self.desk.plan(lane)[1].fill(message)
        return response

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: Context) -> pb.RepositoryIndexResponse:
        """List the repository."""
        _check_repository(request.repository_name)
        return index_of(await self._catalog.entries(is_ready=request.ready))

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: Context
    ) -> pb.RepositoryModelLoadResponse:
        """Serve what is on disk of a model and is not served."""
        _check_repository(request.repository_name)
        if request.parameters:
            raise Unimplemented(
                f"parameter {min(request.parameters)}: models and configurations come from the repository alone; "
                "put the model there and load it without parameters"
            )
        self._engine.check_open()
        await self._catalog.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: Context
    ) -> pb.RepositoryModelUnloadResponse:
        """Serve a model no more; what is live has a while to end."""
        _check_repository(request.repository_name)
        await self._catalog.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Context) -> bytes:
        """Infer. Returns a serialised ModelInferResponse."""
        done = asyncio.get_running_loop().create_future()
        inference = Inference(lambda _: None if done.done() else done.set_result(None))
        inference.id = request.id.encode()
        self.desk.submit(request, inference)
        try:
            await done
        finally:
            inference.cancel()
        if inference.response is None:
            raise inference.error or ServiceError("no answer")
        facts = current()
        facts.steps_in += inference.num_steps
        facts.steps_out += inference.num_steps
        return inference.response

    async def ModelStreamInfer(self, request: object, context: Context) -> None:
        """Answer requests in their order until the client has sent all, or is gone."""
        link = Link(_ignore, [])  # it holds no session: sequences belong to no connection
        self._engine.attach(link)
        stream = InferStream(self.desk, self._engine.settings)
        writer = asyncio.create_task(stream.write_to(context))
        try:
            await self._read(stream, writer, context)
        except ServiceError:  # the status can only be sent once no message is being written
            stream.finish()
            await writer
            raise
        else:
            await writer
        finally:
            self._engine.detach(link)
            stream.drop()
            writer.cancel()

    @staticmethod
    async def _read(stream: InferStream, writer: asyncio.Task[None], context: Context) -> None:
        while (raw := await context.read()) is not grpc.aio.EOF:
            stream.take(raw)
            if stream.is_ready:  # it was answered at once: begin to write it, and then to read
                await asyncio.sleep(0)
            if stream.wants_room:
                await stream.has_room()
                if writer.done():
                    return
        stream.finish()

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Every method by its name; those that carry tensors write bytes, and ModelStreamInfer reads them too."""
        unary = unary_handlers(_SERVICE, self, write_bytes={"ModelInfer"})
        refusals: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.unary_unary_rpc_method_handler(_refusal(name, what)) for name, what in ABSENT.items()
        }
        return {**unary, **refusals, "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self.ModelStreamInfer)}


def _check_repository(name: str) -> None:
    if name:
        raise InvalidInput(f"no repository {name!r}: there is one, without a name", field="repository_name")


def _refusal(name: str, what: str) -> Any:
    """Make the handler of a call that is not there."""

    async def refuse(_: bytes, __: Context) -> bytes:
        raise Unimplemented(f"{name}: this server does not support {what}")

    return refuse


def _ignore(event: Event) -> None:
    """No session of a sequence is on the link of a call."""
