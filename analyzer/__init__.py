"""model → Profile: sample with every component ablated at every noise level, and see what the final output loses."""
