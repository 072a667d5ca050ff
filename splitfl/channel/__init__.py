"""Channels: protocol and transport composed on one I/O thread. No torch here: payloads are buffers."""
