// Lists models, predicts a ragged batch, and streams a sequence step by step, one step of which is refused.
//
//     example TARGET MODEL [CA.pem]
//
// TARGET is host:port; CA.pem turns TLS on. MODEL has one per-step input of floats. SERVICE_CONFIG names the file
// service_config.json beside the proto.

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "rnnserve/v1/rnnserve.grpc.pb.h"

namespace v1 = rnnserve::v1;

namespace {

using Row = std::vector<float>;

constexpr auto kTimeout = std::chrono::seconds(5);
const std::vector<int> kLengths = {5, 2, 9};
constexpr int kNumSteps = 6;
constexpr int kBadStep = 3;

// A call that ended with another status than OK.
struct CallFailed : std::runtime_error {
  explicit CallFailed(const grpc::Status& status)
      : std::runtime_error(Name(status.error_code()) + ": " + status.error_message()) {}

  static std::string Name(int code) {
    static const char* const kNames[] = {
        "OK",           "CANCELLED",         "UNKNOWN",        "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",   "NOT_FOUND",
        "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",     "OUT_OF_RANGE",
        "UNIMPLEMENTED", "INTERNAL",         "UNAVAILABLE",    "DATA_LOSS",          "UNAUTHENTICATED"};
    return code >= 0 && code <= 16 ? kNames[code] : std::to_string(code);
  }
};

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("can't read " + path);
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

std::shared_ptr<grpc::Channel> Connect(const std::string& target, const char* ca) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(64 * 1024 * 1024);  // the default is 4 MiB
  // What is idempotent is tried again, as the file says, up to this size; StreamPredict is not.
  if (const char* path = std::getenv("SERVICE_CONFIG")) arguments.SetServiceConfigJSON(ReadFile(path));
  arguments.SetInt(GRPC_ARG_PER_RPC_RETRY_BUFFER_SIZE, 16 * 1024 * 1024);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 60'000);  // finds out that a server has vanished
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  if (ca == nullptr) return grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
  grpc::SslCredentialsOptions trust;
  trust.pem_root_certs = ReadFile(ca);
  return grpc::CreateCustomChannel(target, grpc::SslCredentials(trust), arguments);
}

// A call without a time limit waits for as long as the server is silent.
void Limit(grpc::ClientContext& context) { context.set_deadline(std::chrono::system_clock::now() + kTimeout); }

void Check(const grpc::Status& status) {
  if (!status.ok()) throw CallFailed(status);
}

// Step t of sequence s: some numbers between -0.5 and 0.5.
Row MakeStep(int s, int t, int width) {
  Row row(width);
  for (int i = 0; i < width; ++i) row[i] = static_cast<float>((s * 5 + t * 7 + i * 3) % 11 / 10.0 - 0.5);
  return row;
}

// Rows as a tensor has them: float32, end to end. Little-endian, as this machine is taken to be.
std::string Pack(const Row& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

std::vector<Row> Unpack(const v1::Tensor& tensor) {
  int width = 1;
  for (int axis = 1; axis < tensor.shape_size(); ++axis) width *= static_cast<int>(tensor.shape(axis));
  std::vector<Row> rows(tensor.data().size() / sizeof(float) / width, Row(width));
  for (size_t i = 0; i < rows.size(); ++i)
    std::memcpy(rows[i].data(), tensor.data().data() + i * width * sizeof(float), width * sizeof(float));
  return rows;
}

void Show(const std::string& what, const Row& row) {
  std::cout << what;
  for (float value : row) {
    char text[32];
    std::snprintf(text, sizeof text, " %.9g", value);
    std::cout << text;
  }
  std::cout << std::endl;
}

// Sequences of any lengths in one call: rows lie end to end, and lengths say where each ends. No padding.
void PredictBatch(v1::SequenceService::Stub& stub, const v1::Model& model, int width) {
  v1::PredictRequest request;
  request.set_model(model.name());
  v1::Tensor& input = *request.add_inputs();
  for (size_t s = 0; s < kLengths.size(); ++s) {
    input.add_lengths(kLengths[s]);
    for (int t = 0; t < kLengths[s]; ++t) input.mutable_data()->append(Pack(MakeStep(static_cast<int>(s), t, width)));
  }
  grpc::ClientContext context;
  Limit(context);
  v1::PredictResponse answer;
  Check(stub.Predict(&context, request, &answer));
  const v1::Tensor& output = answer.outputs(0);
  const std::vector<Row> rows = Unpack(output);
  size_t at = 0;
  for (int s = 0; s < output.lengths_size(); ++s)
    for (uint32_t t = 0; t < output.lengths(s); ++t)
      Show("predict " + std::to_string(s) + " " + std::to_string(t), rows[at++]);
}

// One live sequence: send a step, wait for its output, send the next. The state stays on the server. What is wrong with
// a step comes in-band and leaves the session as it was; what is wrong with the call ends it.
void StreamSteps(v1::SequenceService::Stub& stub, const v1::Model& model, int width) {
  grpc::ClientContext context;
  Limit(context);
  auto call = stub.StreamPredict(&context);
  v1::StreamPredictRequest open;
  open.mutable_open()->set_model(model.name());
  open.mutable_open()->set_step_mode(v1::STEP_MODE_STEPPING);
  call->Write(open);

  bool sends_bad_step = true;
  uint64_t position = 0;
  for (int t = 0; t < kNumSteps;) {
    const bool is_bad = sends_bad_step && t == kBadStep;
    const Row step = is_bad ? Row(width, std::numeric_limits<float>::quiet_NaN()) : MakeStep(0, t, width);
    v1::StreamPredictRequest request;
    request.mutable_frame()->add_positions(position);
    request.mutable_frame()->add_tensors()->set_data(Pack(step));
    call->Write(request);
    for (bool is_answered = false; !is_answered;) {
      v1::StreamPredictResponse response;
      if (!call->Read(&response)) {
        Check(call->Finish());
        throw std::runtime_error("the server ended the stream");
      }
      if (response.has_drain())  // what is live may end within this time
        std::cout << "drain " << response.drain().grace().seconds() << std::endl;
      for (const v1::StepError& error : response.answer().errors()) {
        std::cout << v1::StepErrorKind_Name(error.kind()) << " " << error.position() << " "
                  << CallFailed::Name(error.status().code()) << " " << error.status().message() << std::endl;
        if (error.kind() == v1::STEP_ERROR_KIND_SESSION_FAILED) throw std::runtime_error("the session is over");
        position = error.expected_position();  // state and position did not move: go on from here
        sends_bad_step = false;
        is_answered = true;
      }
      for (const v1::Tensor& tensor : response.answer().tensors()) {
        for (const Row& row : Unpack(tensor)) {
          Show("step " + std::to_string(position++), row);
          ++t;
        }
        is_answered = true;
      }
    }
  }
  call->WritesDone();  // the session ends with it
  v1::StreamPredictResponse rest;
  while (call->Read(&rest)) {
  }
  Check(call->Finish());
}

void Run(const std::string& target, const std::string& name, const char* ca) {
  auto stub = v1::SequenceService::NewStub(Connect(target, ca));
  grpc::ClientContext context;
  Limit(context);
  v1::ListModelsResponse list;
  Check(stub->ListModels(&context, v1::ListModelsRequest(), &list));
  const v1::Model* model = nullptr;
  for (const v1::Model& each : list.models()) {
    std::cout << "model " << each.name() << " " << each.version() << " " << v1::StepMode_Name(each.step_mode()) << " "
              << v1::Exactness_Name(each.exactness()) << std::endl;
    if (each.name() == name) model = &each;  // the newest version comes last
  }
  for (const v1::BrokenModel& each : list.broken()) std::cout << "broken " << each.name() << ": " << each.error() << std::endl;
  if (model == nullptr) throw std::runtime_error("there is no model " + name);
  int width = 1;
  for (int64_t size : model->inputs(0).row_shape()) width *= static_cast<int>(size);
  PredictBatch(*stub, *model, width);
  StreamSteps(*stub, *model, width);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    Run(argc > 1 ? argv[1] : "localhost:8001", argc > 2 ? argv[2] : "", argc > 3 ? argv[3] : nullptr);
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
  return 0;
}
