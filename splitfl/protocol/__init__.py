"""The protocol, sans I/O: messages, states, key schedule, records, credits. It knows no sockets and no torch."""
