"""Studies: what the documentation claims of quality and cost, measured; run from a checkout, not installed."""
