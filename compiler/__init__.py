"""Profile → Plan → Bundle: choose what each phase removes, specialise one engine per phase, write the bundle."""
