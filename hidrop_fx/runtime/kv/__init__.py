"""Per-layer key/value caches, and the static memory that recorded graphs share."""
