"""The floor: a bare grpc.aio server that answers a frame with as many bytes as the real one and computes nothing.

echo.py PORT OUTPUTS: protobuf is parsed and made in full, on the loop and with the settings of the real server.
"""

import os
import sys

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

import grpc.aio
import uvloop

from service.pb.rnnserve.v1 import rnnserve_pb2 as pb
from service.pb.rnnserve.v1 import rnnserve_pb2_grpc as pb_grpc


class Echo(pb_grpc.SequenceServiceServicer):
    def __init__(self, outputs: int) -> None:
        self._row = bytes(4 * outputs)
        self._outputs = outputs

    async def StreamPredict(self, request: object, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await context.read()
        await context.write(pb.StreamPredictResponse(opened=pb.StreamOpened()))
        position = 0
        while (request := await context.read()) is not grpc.aio.EOF:
            frame = request.frame
            handles = frame.handles or [0]
            num = len(handles)
            lengths = frame.lengths or [1] * num
            num_rows = sum(lengths)
            assert len(frame.tensors[0].data)
            tensor = pb.Tensor(
                name="y",
                dtype=pb.DATA_TYPE_FLOAT32,
                shape=[num_rows, self._outputs],
                layout=pb.LAYOUT_PER_STEP,
                data=self._row * num_rows,
            )
            answer = pb.StreamAnswer(handles=handles, positions=[position] * num, lengths=lengths, tensors=[tensor])
            await context.write(pb.StreamPredictResponse(answer=answer))
            position += lengths[0]


async def main(port: int, outputs: int) -> None:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_SequenceServiceServicer_to_server(Echo(outputs), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))
