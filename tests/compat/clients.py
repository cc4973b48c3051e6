"""Uses of clients that others wrote, run in an environment that has them and nothing of ours.

clients.py PART TARGET FOLDER: reads FOLDER/given.npz, writes FOLDER/found.npz and FOLDER/found.json.
"""

import asyncio
import json
import queue
import sys
from pathlib import Path

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from grpc_requests import Client
from tritonclient.utils import InferenceServerException


def tensor(name, values):
    """An input of a tritonclient."""
    kind = {"float32": "FP32", "int32": "INT32", "int64": "INT64"}[values.dtype.name]
    made = triton.InferInput(name, list(values.shape), kind)
    made.set_data_from_numpy(values)
    return made


def sync(target, given):
    """Everything that the blocking client can ask, unary sequences, and what is refused."""
    client = triton.InferenceServerClient(target)
    config = client.get_model_config("steps", as_json=True)["config"]
    whole_config = client.get_model_config("whole", as_json=True)["config"]
    metadata = client.get_model_metadata("steps", as_json=True)
    server = client.get_server_metadata(as_json=True)
    x, lengths = given["batch"], given["lengths"]
    whole = client.infer("whole", [tensor("x", x), tensor("lengths", lengths)], request_id="w1", priority=1)
    timeline = []
    for t, row in enumerate(given["x"]):
        last = t == len(given["x"]) - 1
        result = client.infer(
            "steps",
            [tensor("x", row[None, None])],
            outputs=[triton.InferRequestedOutput("y")],
            sequence_id=17,
            sequence_start=t == 0,
            sequence_end=last,
            timeout=5_000_000,
        )
        timeline.append(result.as_numpy("y")[0, 0])
    errors = {}
    refused = {
        "no start": lambda: client.infer("steps", [tensor("x", x[:1])], sequence_id=99),
        "no model": lambda: client.infer("nope", [tensor("x", x)]),
        "wrong shape": lambda: client.infer("steps", [tensor("x", x[..., 1:])]),
        "shared memory": client.get_system_shared_memory_status,
        "trace": client.get_trace_settings,
        "log": client.get_log_settings,
    }
    for name, call in refused.items():
        try:
            call()
        except InferenceServerException as error:
            errors[name] = [error.status(), error.message()]
    found = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "models ready": [
            client.is_model_ready("steps"),
            client.is_model_ready("steps", "1"),
            client.is_model_ready("no"),
        ],
        "server": server["name"],
        "extensions": server["extensions"],
        "inputs": metadata["inputs"],
        "versions": metadata["versions"],
        "steps batching": sorted(config.keys() & {"sequence_batching", "dynamic_batching"}),
        "whole batching": sorted(whole_config.keys() & {"sequence_batching", "dynamic_batching"}),
        "max_batch_size": config["max_batch_size"],
        "index": client.get_model_repository_index(as_json=True)["models"],
        "statistics": client.get_inference_statistics("steps", as_json=True)["model_stats"][0],
        "id": whole.get_response().id,
        "errors": errors,
    }
    return found, {"whole": whole.as_numpy("y"), "steps": np.stack(timeline)}


def future(target, given):
    """The blocking client's calls with a callback, many at once."""
    client = triton.InferenceServerClient(target)
    answers = queue.Queue()

    def tell(result, error):
        answers.put((result, error))

    for number, x in enumerate(given["xs"]):
        client.async_infer("whole", [tensor("x", x[None])], tell, request_id=str(number))
    rows = {}
    for _ in given["xs"]:
        result, error = answers.get(timeout=30)
        assert error is None, error
        rows[int(result.get_response().id)] = result.as_numpy("y")[0]
    return {}, {"whole": np.stack([rows[number] for number in range(len(rows))])}


def stream(target, given):
    """Interleaved sequences on one stream, one of them refused in the middle, under ids of both types."""
    client = triton.InferenceServerClient(target)
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    xs = given["xs"]
    ids = [1000 + number if number % 2 else f"caller-{number}" for number in range(len(xs))]
    for t in range(xs.shape[1]):
        for number, x in enumerate(xs):
            client.async_stream_infer(
                "steps",
                [tensor("x", x[None, t : t + 1])],
                request_id=f"{number}",
                sequence_id=ids[number],
                sequence_start=t == 0,
                sequence_end=t == xs.shape[1] - 1,
                enable_empty_final_response=True,
            )
    client.async_stream_infer("steps", [tensor("x", xs[0][None, :1])], sequence_id=5, request_id="not begun")
    client.async_stream_infer("whole", [tensor("x", xs[0][None])], request_id="whole")
    timelines = [[] for _ in xs]
    order, final = [], []
    for _ in range(xs.shape[0] * xs.shape[1]):
        result, error = answers.get(timeout=30)
        assert error is None, error
        response = result.get_response()
        order.append(int(response.id))
        final.append(response.parameters["triton_final_response"].bool_param)
        timelines[int(response.id)].append(result.as_numpy("y")[0, 0])
    _, error = answers.get(timeout=30)
    whole, nothing = answers.get(timeout=30)
    assert nothing is None
    client.stop_stream()
    found = {"order": order, "all final": all(final), "error": error.message()}
    return found, {"steps": np.array(timelines), "whole": whole.as_numpy("y")[0]}


def generate(target, given):
    """A model that makes its outputs by itself: all at once, and as they are made."""
    client = triton.InferenceServerClient(target)
    prompts = [tensor("token", given["prompts"])]
    whole = client.infer("names", prompts)
    drawn = client.infer("names", prompts, parameters={"temperature": 0.8, "top_k": 3, "seed": 7})
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("names", prompts, enable_empty_final_response=True)
    made, is_last = {}, False
    while not is_last:
        result, error = answers.get(timeout=30)
        assert error is None, error
        parameters = result.get_response().parameters
        made.setdefault(parameters["sequence"].int64_param, []).extend(result.as_numpy("ids")[0].tolist())
        is_last = parameters["triton_final_response"].bool_param
    client.stop_stream()
    found = {
        "text": [text.decode() for text in whole.as_numpy("text")],
        "drawn": [text.decode() for text in drawn.as_numpy("text")],
        "streamed": [made[number] for number in range(len(made))],
        "decoupled": client.get_model_config("names", as_json=True)["config"]["model_transaction_policy"]["decoupled"],
    }
    return found, {"ids": whole.as_numpy("ids"), "lengths": whole.as_numpy("lengths")}


def aio(target, given):
    """The client on asyncio: unary calls at once, and a stream."""

    async def act():
        xs = given["xs"]
        async with triton_aio.InferenceServerClient(target) as client:
            assert await client.is_server_live()
            assert await client.is_model_ready("steps")
            results = await asyncio.gather(*(client.infer("whole", [tensor("x", x[None])]) for x in xs))

            async def requests():
                for t in range(xs.shape[1]):
                    for number, x in enumerate(xs):
                        yield {
                            "model_name": "steps",
                            "inputs": [tensor("x", x[None, t : t + 1])],
                            "sequence_id": 1 + number,
                            "sequence_start": t == 0,
                            "sequence_end": t == xs.shape[1] - 1,
                        }

            rows = []
            async for result, error in client.stream_infer(requests()):
                assert error is None, error
                rows.append(result.as_numpy("y")[0, 0])
        steps = np.array(rows).reshape(xs.shape[1], xs.shape[0], -1).swapaxes(0, 1)
        return {}, {"whole": np.stack([each.as_numpy("y")[0] for each in results]), "steps": steps}

    return asyncio.run(act())


def reflection(target, given):
    """A client that knows no proto: it asks the server what there is, as grpcurl does."""
    client = Client.get_by_endpoint(target)
    service = "inference.GRPCInferenceService"
    x = given["x"]
    infer = {
        "model_name": "whole",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": list(x.shape), "contents": {"fp32_contents": x.ravel().tolist()}}
        ],
    }
    native = client.request("rnnserve.v1.SequenceService", "GetModel", {"model": "steps"})
    found = {
        "services": list(client.service_names),
        "methods": sorted(client.service(service).method_names),
        "metadata": client.request(service, "ModelMetadata", {"name": "steps"}),
        "response": client.request(service, "ModelInfer", infer),
        "streamed": list(client.request(service, "ModelStreamInfer", [infer, infer])),
        "native": native["model"]["name"],
    }
    return found, {}


if __name__ == "__main__":
    part, target, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    with np.load(folder / "given.npz") as arrays:
        parts = (sync, future, stream, generate, aio, reflection)
        facts, outputs = {each.__name__: each for each in parts}[part](target, dict(arrays))
    np.savez(folder / "found.npz", **outputs)
    (folder / "found.json").write_text(json.dumps({**facts, "grpc": grpc.__version__}))
