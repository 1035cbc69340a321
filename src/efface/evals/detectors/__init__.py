"""One file a detector: it says what stands in a picture."""
