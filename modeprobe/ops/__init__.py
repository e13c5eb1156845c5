"""Operators: fake kernels, autograd, and the choice of backend, one module per family."""
