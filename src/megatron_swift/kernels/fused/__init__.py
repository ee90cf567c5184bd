"""Triton kernels for GPUs. Imported only where they run: Triton is not installed everywhere. Each has a plain twin in `kernels`."""
