"""The method: pure functions over tensors, without a word of ranks."""
