"""How a network runs best on this device: variants tried with real forwards, checked, compared."""
