"""Two-stage inference, metrics, targets and verdict, and the HTML report."""
