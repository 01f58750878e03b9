"""What a run shows of itself: metrics, series, summary, sample and profile."""
