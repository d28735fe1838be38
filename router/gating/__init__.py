"""Gate, dispatch and combine."""
