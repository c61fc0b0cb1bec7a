"""What a network takes and returns, against what a run asks for. Only shapes; no framework."""
