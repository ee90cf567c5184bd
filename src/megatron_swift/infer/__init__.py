"""Generation with a KV cache, and the chat around it."""
