"""Batch inference: very many rows, each exactly once in the output, whatever dies on the way."""
