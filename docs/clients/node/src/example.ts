// Lists models, predicts a ragged batch, and streams a sequence step by step, one step of which is refused.
//
//     node dist/example.js TARGET MODEL [CA.pem]
//
// TARGET is host:port; CA.pem turns TLS on. MODEL has one per-step input of floats.

import * as fs from "node:fs";
import * as path from "node:path";
import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";
import type { ProtoGrpcType } from "./generated/rnnserve.js";
import type { SequenceServiceClient } from "./generated/rnnserve/v1/SequenceService.js";
import type { ListModelsResponse__Output } from "./generated/rnnserve/v1/ListModelsResponse.js";
import type { Model__Output } from "./generated/rnnserve/v1/Model.js";
import type { PredictRequest } from "./generated/rnnserve/v1/PredictRequest.js";
import type { PredictResponse__Output } from "./generated/rnnserve/v1/PredictResponse.js";
import type { StreamPredictRequest } from "./generated/rnnserve/v1/StreamPredictRequest.js";
import type { StreamPredictResponse__Output } from "./generated/rnnserve/v1/StreamPredictResponse.js";
import type { Tensor__Output } from "./generated/rnnserve/v1/Tensor.js";

const PROTOS = process.env["PROTOS"] ?? "../../../protos";
const TIMEOUT_MS = 5_000;
const LENGTHS = [5, 2, 9];
const NUM_STEPS = 6;
const BAD_STEP = 3;

function connect(target: string, ca: string | undefined): SequenceServiceClient {
  const definition = protoLoader.loadSync("rnnserve/v1/rnnserve.proto", {
    includeDirs: [PROTOS, "node_modules/google-proto-files"], // the latter has google/rpc/status.proto
    longs: Number,
    enums: String,
    defaults: true,
    oneofs: true,
  });
  const api = grpc.loadPackageDefinition(definition) as unknown as ProtoGrpcType;
  const credentials = ca ? grpc.credentials.createSsl(fs.readFileSync(ca)) : grpc.credentials.createInsecure();
  return new api.rnnserve.v1.SequenceService(target, credentials, {
    // What is idempotent is tried again, as the file says; StreamPredict is not.
    "grpc.service_config": fs.readFileSync(path.join(PROTOS, "rnnserve/v1/service_config.json"), "utf8"),
    "grpc.max_receive_message_length": 64 * 1024 * 1024, // the default is 4 MiB
    "grpc.keepalive_time_ms": 60_000, // finds out that a server has vanished
    "grpc.keepalive_timeout_ms": 10_000,
  });
}

/** A call without a time limit waits for as long as the server is silent. */
function deadline(): Date {
  return new Date(Date.now() + TIMEOUT_MS);
}

function listModels(client: SequenceServiceClient): Promise<ListModelsResponse__Output> {
  return new Promise((resolve, reject) => {
    client.listModels({}, { deadline: deadline() }, (error, answer) => (answer ? resolve(answer) : reject(error)));
  });
}

function predict(client: SequenceServiceClient, request: PredictRequest): Promise<PredictResponse__Output> {
  return new Promise((resolve, reject) => {
    client.predict(request, { deadline: deadline() }, (error, answer) => (answer ? resolve(answer) : reject(error)));
  });
}

/** Step t of sequence s: some numbers between -0.5 and 0.5. */
function makeStep(s: number, t: number, width: number): number[] {
  return Array.from({ length: width }, (_, i) => ((s * 5 + t * 7 + i * 3) % 11) / 10 - 0.5);
}

/** Rows as a tensor has them: float32, little-endian, end to end. */
function pack(rows: number[][]): Buffer {
  const values = rows.flat();
  const data = Buffer.alloc(4 * values.length);
  values.forEach((value, i) => data.writeFloatLE(value, 4 * i));
  return data;
}

function unpack(tensor: Tensor__Output): number[][] {
  const width = tensor.shape.slice(1).reduce((product, size) => product * size, 1);
  const values = Array.from({ length: tensor.data.length / 4 }, (_, i) => tensor.data.readFloatLE(4 * i));
  return Array.from({ length: values.length / width }, (_, i) => values.slice(i * width, (i + 1) * width));
}

function show(what: string, values: number[]): void {
  console.log(`${what} ${values.map((value) => value.toPrecision(9)).join(" ")}`);
}

/** Sequences of any lengths in one call: rows lie end to end, and lengths say where each ends. No padding. */
async function predictBatch(client: SequenceServiceClient, model: Model__Output, width: number): Promise<void> {
  const rows = LENGTHS.flatMap((length, s) => Array.from({ length }, (_, t) => makeStep(s, t, width)));
  const answer = await predict(client, { model: model.name, inputs: [{ data: pack(rows), lengths: LENGTHS }] });
  const output = answer.outputs[0]!;
  const outputs = unpack(output);
  output.lengths.forEach((length, s) => {
    for (let t = 0; t < length; t++) show(`predict ${s} ${t}`, outputs.shift()!);
  });
}

/**
 * One live sequence: send a step, wait for its output, send the next. The state stays on the server. What is wrong with
 * a step comes in-band and leaves the session as it was; what is wrong with the call ends it.
 */
async function streamSteps(client: SequenceServiceClient, model: Model__Output, width: number): Promise<void> {
  const call = client.streamPredict({ deadline: deadline() });
  const answers: AsyncIterator<StreamPredictResponse__Output> = call[Symbol.asyncIterator]();
  const send = (request: StreamPredictRequest) => call.write(request);

  send({ open: { model: model.name, stepMode: "STEP_MODE_STEPPING" } });
  let [t, position, sendsBadStep] = [0, 0, true];
  while (t < NUM_STEPS) {
    const isBad = sendsBadStep && t === BAD_STEP;
    const step = isBad ? Array<number>(width).fill(NaN) : makeStep(0, t, width);
    send({ frame: { positions: [position], tensors: [{ data: pack([step]) }] } });
    for (let isAnswered = false; !isAnswered; ) {
      const { value: response, done } = await answers.next();
      if (done) throw new Error("the server ended the stream");
      if (response.drain) console.log(`drain ${response.drain.grace?.seconds}`); // what is live may end within this time
      const answer = response.answer;
      if (!answer) continue;
      for (const error of answer.errors) {
        console.log(`${error.kind} ${error.position} ${grpc.status[error.status!.code]} ${error.status!.message}`);
        if (error.kind === "STEP_ERROR_KIND_SESSION_FAILED") throw new Error("the session is over");
        position = error.expectedPosition; // state and position did not move: go on from here
        sendsBadStep = false;
        isAnswered = true;
      }
      for (const tensor of answer.tensors) {
        unpack(tensor).forEach((row, i) => show(`step ${answer.positions[0]! + i}`, row));
        [t, position, isAnswered] = [t + 1, position + 1, true];
      }
    }
  }
  call.end(); // the session ends with it
  while (!(await answers.next()).done);
}

async function main(): Promise<void> {
  const [target = "localhost:8001", name = "", ca] = process.argv.slice(2);
  const client = connect(target, ca);
  try {
    const { models, broken } = await listModels(client);
    for (const model of models) console.log(`model ${model.name} ${model.version} ${model.stepMode} ${model.exactness}`);
    for (const model of broken) console.log(`broken ${model.name}: ${model.error}`);
    const model = models.filter((each) => each.name === name).at(-1); // the newest version
    if (!model) throw new Error(`there is no model ${name}`);
    const width = model.inputs[0]!.rowShape.reduce((product, size) => product * size, 1);
    await predictBatch(client, model, width);
    await streamSteps(client, model, width);
  } finally {
    client.close();
  }
}

main().catch((error: grpc.ServiceError) => {
  console.error(error.code === undefined ? error.message : `${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
