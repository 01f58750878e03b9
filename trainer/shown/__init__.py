"""What a run shows about itself: metrics, series, summary, sample and profile."""
