"""model → Profile: ablate every component at every noise level and measure the damage to the final output."""
