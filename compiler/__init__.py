"""Profile → Plan → Bundle: choose treatments per phase, specialise one engine per phase, write the bundle."""
