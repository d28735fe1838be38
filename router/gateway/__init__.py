"""The front door: gRPC services, text, admission."""
