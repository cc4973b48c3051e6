"""Serves recurrent ONNX models over gRPC and streams an output per timestep of every live sequence."""
