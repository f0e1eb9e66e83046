"""The demo model: a small video model of a world of our own, with its weights, in every size."""
