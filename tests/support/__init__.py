"""What tests, benchmarks and tools share; nothing here is a test."""
