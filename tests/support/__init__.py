"""Models, batches, the independent reference and counters that tests of several folders share."""
