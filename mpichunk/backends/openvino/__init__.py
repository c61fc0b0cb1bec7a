"""Networks run by OpenVINO: the backend and its engine, and where a network comes from."""
