"""The model over flat vectors: its layout, training passes, decoding, PyTorch's names."""
