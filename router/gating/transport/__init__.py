"""Transports to expert groups behind one seam: lane (framed socket), gRPC stream, in process."""
