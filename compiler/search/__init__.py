"""The joint plan, sampled and repaired on real measurements, and controls of equal measured time."""
