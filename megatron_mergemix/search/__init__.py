"""The search for the best mixture: strategies, surrogates, and the loop that drives them."""
