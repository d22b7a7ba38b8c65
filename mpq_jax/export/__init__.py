"""A fine-tuned model as files that other programs run: packed integers, StableHLO, ONNX, Qwix rules."""
