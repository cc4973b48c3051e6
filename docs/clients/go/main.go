// Lists models, predicts a ragged batch, and streams a sequence step by step, one step of which is refused.
//
//	example TARGET MODEL [CA.pem]
//
// TARGET is host:port; CA.pem turns TLS on. MODEL has one per-step input of floats. SERVICE_CONFIG names the file
// service_config.json beside the proto.
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	pb "rnnserve-example/rnnservepb"
)

const (
	timeout  = 5 * time.Second
	numSteps = 6
	badStep  = 3
	mebibyte = 1024 * 1024
)

var lengths = []uint32{5, 2, 9}

// connect makes a channel. Retries of grpc-go are on by default from 1.40, and before it by GRPC_GO_RETRY=on. WithInsecure
// and Dial are what old releases have; newer ones have insecure.NewCredentials and NewClient too.
func connect(target, ca string) (*grpc.ClientConn, error) {
	options := []grpc.DialOption{
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(64*mebibyte),    // the default is 4 MiB
			grpc.MaxRetryRPCBufferSize(16*mebibyte), // larger requests are not tried again; the default is 256 KiB
		),
		// Finds out that a server has vanished.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 60 * time.Second, Timeout: 10 * time.Second}),
	}
	if path := os.Getenv("SERVICE_CONFIG"); path != "" {
		config, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		// What is idempotent is tried again, as the file says; StreamPredict is not.
		options = append(options, grpc.WithDefaultServiceConfig(string(config)))
	}
	if ca == "" {
		options = append(options, grpc.WithInsecure())
	} else {
		trusted, err := credentials.NewClientTLSFromFile(ca, "")
		if err != nil {
			return nil, err
		}
		options = append(options, grpc.WithTransportCredentials(trusted))
	}
	return grpc.Dial(target, options...)
}

// limited gives a call its deadline: without one it waits for as long as the server is silent.
func limited() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), timeout)
}

// makeStep makes step t of sequence s: some numbers between -0.5 and 0.5.
func makeStep(s, t, width int) []float32 {
	row := make([]float32, width)
	for i := range row {
		row[i] = float32(float64((s*5+t*7+i*3)%11)/10 - 0.5)
	}
	return row
}

// pack makes bytes of values as a tensor has them: float32, little-endian, end to end.
func pack(values []float32) []byte {
	data := make([]byte, 4*len(values))
	for i, value := range values {
		binary.LittleEndian.PutUint32(data[4*i:], math.Float32bits(value))
	}
	return data
}

func unpack(tensor *pb.Tensor) [][]float32 {
	width := 1
	for _, size := range tensor.Shape[1:] {
		width *= int(size)
	}
	rows := make([][]float32, len(tensor.Data)/4/width)
	for i := range rows {
		rows[i] = make([]float32, width)
		for j := range rows[i] {
			rows[i][j] = math.Float32frombits(binary.LittleEndian.Uint32(tensor.Data[4*(i*width+j):]))
		}
	}
	return rows
}

func show(what string, row []float32) {
	fmt.Print(what)
	for _, value := range row {
		fmt.Print(" ", strconv.FormatFloat(float64(value), 'g', 9, 64))
	}
	fmt.Println()
}

// predictBatch runs sequences of any lengths in one call: rows lie end to end, and lengths say where each ends. No padding.
func predictBatch(client pb.SequenceServiceClient, model *pb.Model, width int) error {
	input := &pb.Tensor{Lengths: lengths}
	for s, length := range lengths {
		for t := 0; t < int(length); t++ {
			input.Data = append(input.Data, pack(makeStep(s, t, width))...)
		}
	}
	ctx, cancel := limited()
	defer cancel()
	answer, err := client.Predict(ctx, &pb.PredictRequest{Model: model.Name, Inputs: []*pb.Tensor{input}})
	if err != nil {
		return err
	}
	output := answer.Outputs[0]
	rows := unpack(output)
	for s, length := range output.Lengths {
		for t := 0; t < int(length); t++ {
			show(fmt.Sprintf("predict %d %d", s, t), rows[0])
			rows = rows[1:]
		}
	}
	return nil
}

// streamSteps is one live sequence: send a step, wait for its output, send the next. The state stays on the server. What
// is wrong with a step comes in-band and leaves the session as it was; what is wrong with the call ends it.
func streamSteps(client pb.SequenceServiceClient, model *pb.Model, width int) error {
	ctx, cancel := limited()
	defer cancel()
	call, err := client.StreamPredict(ctx)
	if err != nil {
		return err
	}
	open := &pb.StreamOpen{Model: model.Name, StepMode: pb.StepMode_STEP_MODE_STEPPING}
	send := func(request *pb.StreamPredictRequest) error {
		if err := call.Send(request); err != io.EOF { // EOF: Recv tells how the call ended
			return err
		}
		return nil
	}
	if err := send(&pb.StreamPredictRequest{Message: &pb.StreamPredictRequest_Open{Open: open}}); err != nil {
		return err
	}
	position, sendsBadStep := uint64(0), true
	for t := 0; t < numSteps; {
		step := makeStep(0, t, width)
		if sendsBadStep && t == badStep {
			step[0] = float32(math.NaN())
		}
		frame := &pb.StreamFrame{Positions: []uint64{position}, Tensors: []*pb.Tensor{{Data: pack(step)}}}
		if err := send(&pb.StreamPredictRequest{Message: &pb.StreamPredictRequest_Frame{Frame: frame}}); err != nil {
			return err
		}
		for isAnswered := false; !isAnswered; {
			response, err := call.Recv()
			if err == io.EOF {
				return errors.New("the server ended the stream")
			}
			if err != nil {
				return err
			}
			if drain := response.GetDrain(); drain != nil { // what is live may end within this time
				fmt.Println("drain", drain.GetGrace().GetSeconds())
			}
			for _, fault := range response.GetAnswer().GetErrors() {
				code := codes.Code(fault.Status.Code)
				fmt.Println(fault.Kind, fault.Position, name(code), fault.Status.Message)
				if fault.Kind == pb.StepErrorKind_STEP_ERROR_KIND_SESSION_FAILED {
					return errors.New("the session is over")
				}
				position = fault.ExpectedPosition // state and position did not move: go on from here
				sendsBadStep, isAnswered = false, true
			}
			for _, tensor := range response.GetAnswer().GetTensors() {
				for _, row := range unpack(tensor) {
					show(fmt.Sprintf("step %d", position), row)
					t, position = t+1, position+1
				}
				isAnswered = true
			}
		}
	}
	if err := call.CloseSend(); err != nil { // the session ends with it
		return err
	}
	for err == nil {
		_, err = call.Recv()
	}
	if err == io.EOF {
		return nil
	}
	return err
}

func run(target, wanted, ca string) error {
	channel, err := connect(target, ca)
	if err != nil {
		return err
	}
	defer channel.Close()
	client := pb.NewSequenceServiceClient(channel)
	ctx, cancel := limited()
	defer cancel()
	list, err := client.ListModels(ctx, &pb.ListModelsRequest{})
	if err != nil {
		return err
	}
	var model *pb.Model
	for _, each := range list.Models {
		fmt.Println("model", each.Name, each.Version, each.StepMode, each.Exactness)
		if each.Name == wanted {
			model = each // the newest version comes last
		}
	}
	for _, each := range list.Broken {
		fmt.Printf("broken %s: %s\n", each.Name, each.Error)
	}
	if model == nil {
		return fmt.Errorf("there is no model %s", wanted)
	}
	width := 1
	for _, size := range model.Inputs[0].RowShape {
		width *= int(size)
	}
	if err := predictBatch(client, model, width); err != nil {
		return err
	}
	return streamSteps(client, model, width)
}

// name spells a code as the other languages do.
func name(code codes.Code) string {
	names := map[codes.Code]string{
		codes.Canceled:          "CANCELLED",
		codes.InvalidArgument:   "INVALID_ARGUMENT",
		codes.DeadlineExceeded:  "DEADLINE_EXCEEDED",
		codes.NotFound:          "NOT_FOUND",
		codes.ResourceExhausted: "RESOURCE_EXHAUSTED",
		codes.Aborted:           "ABORTED",
		codes.Unavailable:       "UNAVAILABLE",
	}
	if spelled, ok := names[code]; ok {
		return spelled
	}
	return code.String()
}

func argument(index int, otherwise string) string {
	if index < len(os.Args) {
		return os.Args[index]
	}
	return otherwise
}

func main() {
	if err := run(argument(1, "localhost:8001"), argument(2, ""), argument(3, "")); err != nil {
		if fault, ok := status.FromError(err); ok {
			fmt.Fprintf(os.Stderr, "%s: %s\n", name(fault.Code()), fault.Message())
		} else {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
}
