"""Models that several processes hold together: what must be the same in each, so that none waits for another."""
