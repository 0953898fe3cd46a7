"""INT8: quantization-aware training on equivalent kernels, and what prepares and examines a model for INT8."""
