"""Sessions and cached KV outside of the process: what is stored in Redis or Valkey, and how."""
