"""Models as other programs have them: Hugging Face's transformers, Keras, ONNX."""
