"""One endpoint over all ranks: the engine that serves batches, and its HTTP side."""
