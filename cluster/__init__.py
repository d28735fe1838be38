"""Processes and life cycle: the command line, Ray, and what keeps the cluster together."""
