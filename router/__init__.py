"""The router: gateway, engine, trunk and gating of one serving process."""
