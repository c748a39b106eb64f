"""Profile → Plan: pure and deterministic; the same profile and options give the same bytes."""
