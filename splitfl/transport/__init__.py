"""What carries frames: ZeroMQ over TCP, and an in-memory twin for tests."""
