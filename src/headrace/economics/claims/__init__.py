"""The claims of a widely read post of 2021 on the cost of inference, recomputed."""
