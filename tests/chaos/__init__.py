"""Faults injected into real parts: what a request sees, and that nothing leaks."""
