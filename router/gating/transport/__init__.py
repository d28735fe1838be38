"""Transports behind one seam: in-process, gRPC stream, lane."""
