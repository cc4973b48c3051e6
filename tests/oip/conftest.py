from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.pb.inference import inference_pb2_grpc as pb_grpc
from tests.oip.calls import stub_of
from tests.serving import Served


@pytest.fixture
def stub(served: Served) -> Iterator[pb_grpc.GRPCInferenceServiceStub]:
    """Calls of the protocol to the server of all models."""
    with stub_of(served) as stub:
        yield stub
