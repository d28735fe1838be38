"""Wire contracts of ExpertMesh: protocol buffers, tensors on the wire, errors, and the Python client."""
