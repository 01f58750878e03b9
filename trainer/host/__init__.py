"""The machine and this process, as far as a run needs to know them: clock, processors, locks, terminal. No torch."""
