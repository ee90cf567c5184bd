"""How weights and training state reach and leave the disk."""
