"""Experts: where they live, how they are loaded, how they compute."""
