"""What a run needs to know of the machine and this process: clock, processors, locks, terminal. No torch."""
