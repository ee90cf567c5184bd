"""Every parameter once: name, type, default, help and rule. Standard library only; nothing here imports torch."""
