"""Which rank computes which block: pure decisions, and the messages that carry them."""
