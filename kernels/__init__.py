"""Arrays in, arrays out: one operator a file, the plain NumPy oracle, the forward and the backward side by side.

Imported as ``dllm.kernels`` through the link ``dllm/kernels -> ../kernels``; never ``import kernels``, which would make
a second copy of every module. Kernels allocate nothing: outputs and saved activations are arguments and come first.
The notation stands at the top of lstm.py.
"""
