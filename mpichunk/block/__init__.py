"""One block, from what is read to what is written."""
