"""Megatron-SWIFT, natively on PyTorch: train large language models with Megatron's parallelism."""

__version__ = "0.1.0"
