"""GPU slots: which there are, and leasing them."""
