import com.google.gson.Gson;
import com.google.protobuf.ByteString;
import io.grpc.ChannelCredentials;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.stub.StreamObserver;
import java.io.File;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Map;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;
import rnnserve.v1.Rnnserve;
import rnnserve.v1.SequenceServiceGrpc;

/**
 * Lists models, predicts a ragged batch, and streams a sequence step by step, one step of which is refused.
 *
 * <pre>java Example TARGET MODEL [CA.pem]</pre>
 *
 * TARGET is host:port; CA.pem turns TLS on. MODEL has one per-step input of floats. SERVICE_CONFIG names the file
 * service_config.json beside the proto.
 */
public final class Example {
  private static final int TIMEOUT_S = 5;
  private static final int[] LENGTHS = {5, 2, 9};
  private static final int NUM_STEPS = 6;
  private static final int BAD_STEP = 3;
  private static final int MEBIBYTE = 1024 * 1024;

  private Example() {}

  public static void main(String[] args) throws Exception {
    ManagedChannel channel = connect(args.length > 0 ? args[0] : "localhost:8001", args.length > 2 ? args[2] : null);
    int status = 0;
    try {
      run(channel, args.length > 1 ? args[1] : "");
    } catch (StatusRuntimeException error) {
      System.err.println(error.getStatus().getCode() + ": " + error.getStatus().getDescription());
      status = 1;
    } catch (IllegalStateException error) {
      System.err.println(error.getMessage());
      status = 1;
    } finally {
      channel.shutdownNow().awaitTermination(TIMEOUT_S, TimeUnit.SECONDS);
    }
    System.exit(status);
  }

  private static ManagedChannel connect(String target, String ca) throws IOException {
    ChannelCredentials credentials =
        ca == null
            ? InsecureChannelCredentials.create()
            : TlsChannelCredentials.newBuilder().trustManager(new File(ca)).build();
    ManagedChannelBuilder<?> builder =
        Grpc.newChannelBuilder(target, credentials)
            .maxInboundMessageSize(64 * MEBIBYTE) // the default is 4 MiB
            .keepAliveTime(60, TimeUnit.SECONDS) // finds out that a server has vanished
            .keepAliveTimeout(10, TimeUnit.SECONDS);
    String path = System.getenv("SERVICE_CONFIG");
    if (path != null) {
      @SuppressWarnings("unchecked")
      Map<String, ?> config = new Gson().fromJson(Files.readString(Path.of(path)), Map.class);
      // What is idempotent is tried again, as the file says, up to this size; StreamPredict is not.
      builder.defaultServiceConfig(config).enableRetry().perRpcBufferLimit(16L * MEBIBYTE);
    }
    return builder.build();
  }

  private static void run(ManagedChannel channel, String wanted) throws InterruptedException {
    SequenceServiceGrpc.SequenceServiceBlockingStub stub = SequenceServiceGrpc.newBlockingStub(channel);
    // A deadline counts from here, so each call gets its own. Without one it waits for as long as the server is silent.
    Rnnserve.ListModelsResponse list =
        stub.withDeadlineAfter(TIMEOUT_S, TimeUnit.SECONDS).listModels(Rnnserve.ListModelsRequest.getDefaultInstance());
    Rnnserve.Model model = null;
    for (Rnnserve.Model each : list.getModelsList()) {
      System.out.printf(
          "model %s %d %s %s%n", each.getName(), each.getVersion(), each.getStepMode(), each.getExactness());
      if (each.getName().equals(wanted)) {
        model = each; // the newest version comes last
      }
    }
    for (Rnnserve.BrokenModel each : list.getBrokenList()) {
      System.out.printf("broken %s: %s%n", each.getName(), each.getError());
    }
    if (model == null) {
      throw new IllegalStateException("there is no model " + wanted);
    }
    int width = 1;
    for (long size : model.getInputs(0).getRowShapeList()) {
      width *= (int) size;
    }
    predictBatch(stub, model, width);
    streamSteps(channel, model, width);
  }

  /** Sequences of any lengths in one call: rows lie end to end, and lengths say where each ends. No padding. */
  private static void predictBatch(
      SequenceServiceGrpc.SequenceServiceBlockingStub stub, Rnnserve.Model model, int width) {
    Rnnserve.Tensor.Builder input = Rnnserve.Tensor.newBuilder();
    ByteString data = ByteString.EMPTY;
    for (int s = 0; s < LENGTHS.length; s++) {
      input.addLengths(LENGTHS[s]);
      for (int t = 0; t < LENGTHS[s]; t++) {
        data = data.concat(pack(makeStep(s, t, width)));
      }
    }
    Rnnserve.PredictResponse answer =
        stub.withDeadlineAfter(TIMEOUT_S, TimeUnit.SECONDS)
            .predict(
                Rnnserve.PredictRequest.newBuilder()
                    .setModel(model.getName())
                    .addInputs(input.setData(data))
                    .build());
    Rnnserve.Tensor output = answer.getOutputs(0);
    List<float[]> rows = unpack(output);
    int at = 0;
    for (int s = 0; s < output.getLengthsCount(); s++) {
      for (int t = 0; t < output.getLengths(s); t++) {
        show("predict " + s + " " + t, rows.get(at++));
      }
    }
  }

  /** Puts what comes on a stream into a queue: a response, a Throwable, or this observer itself at the good end. */
  private static final class Responses implements StreamObserver<Rnnserve.StreamPredictResponse> {
    private final BlockingQueue<Object> queue = new LinkedBlockingQueue<>();

    @Override
    public void onNext(Rnnserve.StreamPredictResponse response) {
      queue.add(response);
    }

    @Override
    public void onError(Throwable error) {
      queue.add(error);
    }

    @Override
    public void onCompleted() {
      queue.add(this);
    }

    /** Waits for the next; null is the good end. The call's deadline ends the wait. */
    Rnnserve.StreamPredictResponse next() throws InterruptedException {
      Object found = queue.take();
      if (found instanceof Throwable) {
        throw Status.fromThrowable((Throwable) found).asRuntimeException();
      }
      return found == this ? null : (Rnnserve.StreamPredictResponse) found;
    }
  }

  /**
   * One live sequence: send a step, wait for its output, send the next. The state stays on the server. What is wrong
   * with a step comes in-band and leaves the session as it was; what is wrong with the call ends it.
   */
  private static void streamSteps(ManagedChannel channel, Rnnserve.Model model, int width)
      throws InterruptedException {
    Responses responses = new Responses();
    StreamObserver<Rnnserve.StreamPredictRequest> requests =
        SequenceServiceGrpc.newStub(channel)
            .withDeadlineAfter(TIMEOUT_S, TimeUnit.SECONDS)
            .streamPredict(responses);
    requests.onNext(
        Rnnserve.StreamPredictRequest.newBuilder()
            .setOpen(
                Rnnserve.StreamOpen.newBuilder()
                    .setModel(model.getName())
                    .setStepMode(Rnnserve.StepMode.STEP_MODE_STEPPING))
            .build());
    boolean sendsBadStep = true;
    long position = 0;
    for (int t = 0; t < NUM_STEPS; ) {
      float[] step = makeStep(0, t, width);
      if (sendsBadStep && t == BAD_STEP) {
        Arrays.fill(step, Float.NaN);
      }
      requests.onNext(
          Rnnserve.StreamPredictRequest.newBuilder()
              .setFrame(
                  Rnnserve.StreamFrame.newBuilder()
                      .addPositions(position)
                      .addTensors(Rnnserve.Tensor.newBuilder().setData(pack(step))))
              .build());
      for (boolean isAnswered = false; !isAnswered; ) {
        Rnnserve.StreamPredictResponse response = responses.next();
        if (response == null) {
          throw new IllegalStateException("the server ended the stream");
        }
        if (response.hasDrain()) { // what is live may end within this time
          System.out.println("drain " + response.getDrain().getGrace().getSeconds());
        }
        for (Rnnserve.StepError error : response.getAnswer().getErrorsList()) {
          System.out.printf(
              "%s %d %s %s%n",
              error.getKind(),
              error.getPosition(),
              Status.fromCodeValue(error.getStatus().getCode()).getCode(),
              error.getStatus().getMessage());
          if (error.getKind() == Rnnserve.StepErrorKind.STEP_ERROR_KIND_SESSION_FAILED) {
            throw new IllegalStateException("the session is over");
          }
          position = error.getExpectedPosition(); // state and position did not move: go on from here
          sendsBadStep = false;
          isAnswered = true;
        }
        for (Rnnserve.Tensor tensor : response.getAnswer().getTensorsList()) {
          for (float[] row : unpack(tensor)) {
            show("step " + position++, row);
            t++;
          }
          isAnswered = true;
        }
      }
    }
    requests.onCompleted(); // the session ends with it
    while (responses.next() != null) {
      continue;
    }
  }

  /** Step t of sequence s: some numbers between -0.5 and 0.5. */
  private static float[] makeStep(int s, int t, int width) {
    float[] row = new float[width];
    for (int i = 0; i < width; i++) {
      row[i] = (float) ((s * 5 + t * 7 + i * 3) % 11 / 10.0 - 0.5);
    }
    return row;
  }

  /** Bytes of values as a tensor has them: float32, little-endian, end to end. */
  private static ByteString pack(float[] values) {
    ByteBuffer buffer = ByteBuffer.allocate(Float.BYTES * values.length).order(ByteOrder.LITTLE_ENDIAN);
    buffer.asFloatBuffer().put(values);
    return ByteString.copyFrom(buffer);
  }

  private static List<float[]> unpack(Rnnserve.Tensor tensor) {
    int width = 1;
    for (int axis = 1; axis < tensor.getShapeCount(); axis++) {
      width *= (int) tensor.getShape(axis);
    }
    ByteBuffer data = tensor.getData().asReadOnlyByteBuffer().order(ByteOrder.LITTLE_ENDIAN);
    List<float[]> rows = new ArrayList<>();
    while (data.hasRemaining()) {
      float[] row = new float[width];
      for (int i = 0; i < width; i++) {
        row[i] = data.getFloat();
      }
      rows.add(row);
    }
    return rows;
  }

  private static void show(String what, float[] row) {
    StringBuilder line = new StringBuilder(what);
    for (float value : row) {
      line.append(' ').append(value); // as many digits as it takes to read the same number again
    }
    System.out.println(line);
  }
}
