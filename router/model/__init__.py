"""The trunk: everything of the model but the routed experts."""
