"""What a candidate is scored on, and the utility that joins the scores."""
