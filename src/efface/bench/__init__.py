"""What is measured, on which pictures, and what it gave: plans, protocols and results."""
