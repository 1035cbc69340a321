"""What looks at pictures and models: detectors, metrics, attacks."""
