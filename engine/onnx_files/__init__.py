"""A detector as an ONNX file: what export.py writes, and what eval.py, predict.py and app.py take for a checkpoint.

graph     from PyTorch to a graph, its choice of detections, and what its metadata says
int8      post-training quantization of a graph
detector  a file run by onnxruntime, with the interface of a detector

The folder cannot be called onnx or onnx_model: onnxruntime imports modules of these names from the top level.
"""
