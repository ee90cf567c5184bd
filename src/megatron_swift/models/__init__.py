"""Architecture on one device. Nothing here imports torch.distributed."""
